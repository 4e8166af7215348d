"""The error for an instruction form that the numerics do not implement."""

from __future__ import annotations


class Unsupported(ValueError):
    """A combination of operation, types and qualifiers that is not in the PTX ISA or not implemented.

    The message names the form; the caller, which knows the PTX line, turns it into an ``EmulatorError``.
    """
