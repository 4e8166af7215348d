"""What sm12x raises beyond ValueError and TypeError, which name a bad argument."""

from __future__ import annotations


class CudaError(RuntimeError):
    """A CUDA driver call failed.

    Attributes: `call` is the driver function, `name`, `code` and `text` are the driver's words for its
    status, `variant` and `shapes` say what was being launched (None where nothing was).
    """

    def __init__(
        self,
        message: str,
        *,
        call: str | None = None,
        name: str | None = None,
        code: int | None = None,
        text: str | None = None,
        variant: str | None = None,
        shapes: str | None = None,
    ) -> None:
        super().__init__(message)
        self.call = call
        self.name = name
        self.code = code
        self.text = text
        self.variant = variant
        self.shapes = shapes


class DriverError(CudaError):
    """There is no NVIDIA driver, or it is too old for the cubins of this package."""


class UnsupportedDeviceError(CudaError):
    """No cubin of this package runs on the device."""


class CubinError(RuntimeError):
    """The manifest or a cubin is missing, truncated, altered, or of another schema or ABI."""
