"""The safetensors files of a checkpoint: which tensors there are, and their bytes, one slice at a time.

The `safetensors` package checks a file's header against the file. The bytes are read here, at the places that
the header gives: through version 0.8 the package has no 8-bit floats for NumPy, and a file mapped whole into
memory by its slices is no bound on what is held.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x.arrays import numpy_dtype
from sm12x.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# The format's names of the dtypes that are read here; others keep the format's own name.
_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: `offset` is that of its first byte in the file, its elements lie row-major."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def error(self, expected: str, given: str | None = None) -> CheckpointError:
        """An error that names the tensor; `given` is by default its dtype and shape."""
        return CheckpointError(self.file, self.name, expected, given or f"{self.dtype} {self.shape}")


@dataclass
class Files:
    """The files in `folder`; `files` says which of them has which tensor."""

    folder: Path
    files: Mapping[str, str]
    _headers: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def tensor(self, name: str, *others: str) -> Tensor:
        """The tensor of that name, or of the first of `others` that there is. Raises CheckpointError."""
        for each in (name, *others):
            if each in self.files:
                return self._in_its_file(each)
        like = _similar(name, self.files)
        raise CheckpointError(
            self.folder / INDEX if (self.folder / INDEX).is_file() else self.folder / SINGLE,
            name,
            "this tensor" + (f", or {' or '.join(others)}" if others else ""),
            f"none of that name among {len(self.files)}" + (f" (there is {like})" if like else ""),
        )

    def find(self, *names: str) -> Tensor | None:
        """The first tensor that there is of these names."""
        return next((self._in_its_file(each) for each in names if each in self.files), None)

    def _in_its_file(self, name: str) -> Tensor:
        file = self.files[name]
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file)
        tensor = self._headers[file].get(name)
        if tensor is None:
            raise CheckpointError(
                self.folder / file, name, f"this tensor, as {INDEX} says", "none of that name"
            )
        return tensor


def open_files(folder: Path) -> Files:
    """The files of a checkpoint: those that model.safetensors.index.json names, else model.safetensors.

    Raises CheckpointError where neither can be read, ImportError where `safetensors` is not installed.
    """
    if (folder / INDEX).is_file():
        files = read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in files.values()
        ):
            raise CheckpointError(
                folder / INDEX, None, "a weight_map of tensor names to files beside it", _short(files)
            )
        return Files(folder, files)
    if not (folder / SINGLE).is_file():
        found = sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")
        raise CheckpointError(
            folder, None, f"{INDEX} or {SINGLE}", f"safetensors files {found}" if found else "neither"
        )
    tensors = read_header(folder / SINGLE)
    return Files(folder, dict.fromkeys(tensors, SINGLE), {SINGLE: tensors})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where there is no such file or no such object in it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(file, None, "a readable file", str(error)) from error
    except ValueError as error:
        raise CheckpointError(file, None, "JSON", str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(file, None, "a JSON object", _short(value))
    return value


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises CheckpointError where it is missing, damaged or cut short."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            'reading a checkpoint needs safetensors: pip install safetensors, or the extra "checkpoint"'
        ) from error
    try:
        with safe_open(file, framework="numpy"):  # checks the header, and that it fits the file
            pass
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(file, None, "a whole safetensors file", str(error)) from error
    return {
        name: Tensor(
            name,
            file,
            _DTYPES.get(entry["dtype"], entry["dtype"]),
            tuple(entry["shape"]),
            8 + size + entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read(tensor: Tensor, index: int | None = None) -> NDArray[Any]:
    """A copy of the tensor, or of its slice `index` along the first axis, and of nothing else of the file.

    Raises CheckpointError where the file ends before it.
    """
    shape = tensor.shape if index is None else tensor.shape[1:]
    values: NDArray[Any] = np.empty(shape, numpy_dtype(tensor.dtype))
    start = tensor.offset + (index or 0) * values.nbytes
    with tensor.file.open("rb", buffering=0) as opened:
        opened.seek(start)
        if not _fill(opened, values.reshape(-1).view(np.uint8)):
            raise tensor.error(f"{values.nbytes} bytes at {start}", "the end of the file")
    return values


def _fill(opened: Any, values: NDArray[np.uint8]) -> bool:
    """Read until `values` are full, 2 GB at most at a time on Linux; false where the file ends before."""
    rest = memoryview(values.data)
    while rest:
        count = opened.readinto(rest)
        if not count:
            return False
        rest = rest[count:]
    return True


def _similar(name: str, names: Iterable[str]) -> str | None:
    """The name that shares the longest beginning with `name`, if that is more than half of it."""
    best = max(names, key=lambda other: _common(name, other), default="")
    return best if _common(name, best) > len(name) // 2 else None


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
