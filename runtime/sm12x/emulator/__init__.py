"""A CPU emulator that runs the PTX behind the shipped cubins, instruction by instruction, with NumPy.

`sm12x.grouped_gemm(..., backend="emulator")` runs host arrays on it, through the runtime's own code; `use`
chooses device and seed and records the launches. `launch` runs any PTX.
"""

from .errors import EmulatorError, Violation
from .session import Launch, Options, Session, use

__all__ = ["EmulatorError", "Launch", "Options", "Session", "Violation", "use"]
