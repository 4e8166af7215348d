"""The build of sm12x's cubins: variant table -> PTX -> cubins -> manifest. Standard library only."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TARGETS = ("sm_120a", "sm_121a", "sm_90a")
MAJORS = ("cu12", "cu13")


class BuildError(RuntimeError):
    """The build cannot go on; the message says why and, where one is known, what to do."""
