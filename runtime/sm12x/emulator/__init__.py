"""A CPU emulator that runs the PTX behind the shipped cubins, instruction by instruction, with NumPy.

`launch.load` reads PTX text, `launch.launch` runs a kernel of it on a grid, `memory.GlobalMemory` stands for
the memory of the device. Not yet reachable through `sm12x.grouped_gemm`.
"""

from .errors import EmulatorError, Violation

__all__ = ["EmulatorError", "Violation"]
