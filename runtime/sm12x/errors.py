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


class CheckpointError(ValueError):
    """A checkpoint on disk lacks something, or has it in a form that cannot be used.

    Attributes: `file` is where it was looked for, `tensor` the tensor's name (None where the file itself, or
    an entry of config.json, is what is wrong), `expected` and `given` what was expected and found there.
    """

    def __init__(self, file: object, tensor: str | None, expected: str, given: str) -> None:
        super().__init__(f"{file}: {f'{tensor}: ' if tensor else ''}expected {expected}, got {given}")
        self.file = str(file)
        self.tensor = tensor
        self.expected = expected
        self.given = given
