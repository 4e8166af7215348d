"""Where the variables of a kernel lie: shared, local and parameter offsets, addresses of global variables."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import EmulatorError
from .memory import SHARED_BASE
from .ptx.ir import Kernel, Variable

# Type and size of a "generic" sized address; parameters are limited to this many bytes (PTX ISA, "Kernel
# Function Parameters").
PARAMETER_LIMIT = 32764


@dataclass(slots=True)
class Layout:
    """Addresses of a kernel's variables, each in its own state space, and how much of each space they take.

    `addresses` are offsets for parameters and local variables, addresses for shared, constant and global
    ones. Dynamic shared memory begins at `dynamic_shared`, behind the `static_shared` bytes of the kernel's
    own variables.
    """

    addresses: dict[str, int] = field(default_factory=dict)
    parameter_bytes: int = 0
    static_shared: int = 0
    dynamic_shared: int = SHARED_BASE
    local_bytes: int = 0

    def address(self, name: str) -> int:
        if name not in self.addresses:
            raise EmulatorError(f"{name} has no address")
        return self.addresses[name]


def _place(at: int, variable: Variable) -> int:
    return -(-at // variable.align) * variable.align


def lay_out(
    kernel: Kernel, module_variables: dict[str, Variable], module_addresses: dict[str, int]
) -> Layout:
    """The layout of `kernel`; `module_addresses` are those of the module's global and constant variables."""
    layout = Layout(dict(module_addresses))
    for variable in kernel.parameters:
        layout.addresses[variable.name] = at = _place(layout.parameter_bytes, variable)
        layout.parameter_bytes = at + variable.size
    if layout.parameter_bytes > PARAMETER_LIMIT:
        raise EmulatorError(
            f"{kernel.name} has {layout.parameter_bytes} bytes of parameters", None, kernel.line
        )
    shared = SHARED_BASE
    dynamic: list[Variable] = []
    for variable in [*module_variables.values(), *kernel.variables.values()]:
        if variable.space == "shared" and variable.size == 0:
            dynamic.append(variable)
        elif variable.space == "shared":
            layout.addresses[variable.name] = at = _place(shared, variable)
            shared = at + variable.size
        elif variable.space == "local":
            layout.addresses[variable.name] = at = _place(layout.local_bytes, variable)
            layout.local_bytes = at + variable.size
    layout.static_shared = shared - SHARED_BASE
    # Every extern array is the same dynamic memory, 16-byte aligned as the CUDA programming guide has it, or
    # better.
    align = max([16, *(variable.align for variable in dynamic)])
    layout.dynamic_shared = -(-shared // align) * align
    layout.addresses.update({variable.name: layout.dynamic_shared for variable in dynamic})
    return layout
