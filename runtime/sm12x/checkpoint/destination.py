"""Where a layer goes: memory of a framework, allocated once and filled a matrix at a time."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x.arrays import numpy_dtype

FRAMEWORKS = ("torch", "cupy", "numpy", "sm12x")


@dataclass(frozen=True)
class Destination:
    """Memory of one framework on one device.

    empty(shape, dtype): a new row-major array. put(array, at, values): copy `values` from the host into a
    contiguous part of it, done when it returns. `dtype`: what `sm12x.fused_moe` has to be told of e4m3
    weights, None where their arrays say it themselves.
    """

    framework: str
    empty: Callable[[tuple[int, ...], str], Any]
    put: Callable[[Any, tuple[Any, ...], NDArray[Any]], None]
    dtype: str | None = None

    def copy(self, values: NDArray[Any]) -> Any:
        """A new array with the values of one on the host."""
        array = self.empty(values.shape, values.dtype.name)
        self.put(array, (), values)
        return array


def destination(framework: str | None, device: Any) -> Destination:
    """As `load_moe_layer` documents its arguments. Raises ValueError and TypeError naming them."""
    if framework is not None and framework not in FRAMEWORKS:
        raise ValueError(f"framework: expected None or one of {', '.join(FRAMEWORKS)}, got {framework!r}")
    on = _device(device)
    if framework is None:
        framework = "numpy" if on == "cpu" else _framework_with_gpu()
    if framework == "numpy":
        if on not in (None, "cpu"):
            raise ValueError(f"device: expected None or 'cpu' for NumPy arrays, got {device!r}")
        return Destination("numpy", _empty_numpy, _put_numpy)
    if framework == "torch":
        return _torch(f"cuda:{on}" if isinstance(on, int) else on or "cuda")
    if on == "cpu":
        raise ValueError(f"device: expected a CUDA device for framework {framework!r}, got {device!r}")
    ordinal = on if isinstance(on, int) else None
    return _cupy(ordinal) if framework == "cupy" else _own(ordinal or 0)


def _device(device: Any) -> str | int | None:
    """A CUDA ordinal, "cuda" for the current one, "cpu", or None where no device is named."""
    if device is None:
        return None
    if str(device) in ("cuda", "cpu"):
        return str(device)
    kind, _, number = str(device).partition(":")  # a torch.device prints as "cuda:0"
    number = number if kind == "cuda" else kind
    if isinstance(device, bool) or not number.isdecimal():
        raise ValueError(f"device: expected None, 'cpu', 'cuda', 'cuda:N' or N, got {device!r}")
    return int(number)


def _framework_with_gpu() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return "torch"
    if importlib.util.find_spec("cupy") is not None:
        try:
            if importlib.import_module("cupy").cuda.is_available():
                return "cupy"
        except ImportError:  # installed, but not for this machine
            pass
    return "numpy"


def _empty_numpy(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    return np.empty(shape, numpy_dtype(dtype))


def _put_numpy(array: NDArray[Any], at: tuple[Any, ...], values: NDArray[Any]) -> None:
    array[at] = values


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    """Values of a dtype that frameworks take from NumPy: e4m3 as uint8."""
    return values.view(np.uint8) if values.dtype.itemsize == 1 else values


def _torch(device: str) -> Destination:
    torch: Any = importlib.import_module("torch")

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)

    def put(array: Any, at: tuple[Any, ...], values: NDArray[Any]) -> None:
        target = array.view(torch.uint8) if values.dtype.itemsize == 1 else array
        target[at].copy_(torch.from_numpy(_bits(values)))

    return Destination("torch", empty, put)


def _cupy(ordinal: int | None) -> Destination:
    cupy: Any = importlib.import_module("cupy")
    device = cupy.cuda.Device(ordinal)  # None: the current one

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        with device:
            return cupy.empty(shape, dtype="uint8" if dtype == "float8_e4m3fn" else dtype)

    def put(array: Any, at: tuple[Any, ...], values: NDArray[Any]) -> None:
        with device:
            (array[at] if at else array).set(_bits(values))
            cupy.cuda.get_current_stream().synchronize()

    return Destination("cupy", empty, put, dtype="float8_e4m3fn")


def _own(ordinal: int) -> Destination:
    from sm12x import device_memory, driver

    device = driver.get_device(ordinal)

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        return device_memory.empty(device, shape, dtype, None)

    def put(array: Any, at: tuple[Any, ...], values: NDArray[Any]) -> None:
        starts = [index.start if isinstance(index, slice) else index for index in at]
        first = sum(start * step for start, step in zip(starts, array.strides, strict=False))
        device_memory.write(device, array, first, values)

    return Destination("sm12x", empty, put)
