"""Reading PTX text: `parse` makes a Module of it."""

from __future__ import annotations

from .ir import Instruction, Kernel, Module
from .parser import parse

__all__ = ["Instruction", "Kernel", "Module", "parse"]
