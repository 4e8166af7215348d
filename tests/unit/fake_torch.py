"""As much of torch as sm12x reads: tensors that are addresses, and a module to find them in."""

from __future__ import annotations

import copy
import types

BASE = 0x7F00_8000_0000  # addresses beyond 32 bits, as real ones are


class _Dtype:
    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"torch.{self.name}"


_DTYPES = {
    name: _Dtype(name)
    for name in (
        *("float8_e4m3fn", "float8_e5m2", "uint8", "int8", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    )
}


class Tensor:
    """As much of torch.Tensor as sm12x reads. `device` -1 is the host."""

    __module__ = "torch"
    is_neg = staticmethod(lambda: False)
    is_nested = False

    def __init__(self, ptr, shape, dtype, strides=None, device=0):
        self.address, self.extents, self.dtype, self.ordinal = ptr, tuple(shape), _DTYPES[dtype], device
        compact, step = [], 1
        for extent in reversed(self.extents):
            compact.append(step)
            step *= extent
        self.steps = tuple(reversed(compact)) if strides is None else tuple(strides)
        self.is_cuda, self.is_cpu = device >= 0, device < 0
        self.requires_grad = False

    def detach(self):
        return copy.copy(self)

    @property
    def shape(self):
        if self.is_nested:
            raise RuntimeError("Internal error: NestedTensorImpl doesn't support sizes")
        return self.extents

    def data_ptr(self):
        return self.address

    def stride(self):
        return self.steps

    def get_device(self):
        return self.ordinal

    @property
    def device(self):
        return "cpu" if self.ordinal < 0 else f"cuda:{self.ordinal}"


class Ended(BaseException):
    """The process would have ended here."""


class TensorGuards:
    """torch.compile's, which knows again tensors that differ in nothing but addresses and values."""

    def __init__(self, *tensors, dynamic_dims_sizes, dynamic_dims_strides):
        assert (dynamic_dims_sizes, dynamic_dims_strides) == (None, None)
        self.seen = [self._facts(each) for each in tensors]

    def _facts(self, tensor):
        if not isinstance(tensor, Tensor):
            return type(tensor)
        if tensor.is_nested:  # torch ends the process
            raise Ended("a guard was asked about a nested tensor")
        facts = tensor.shape, tensor.dtype, tensor.device, tensor.stride(), tensor.is_neg()
        return type(tensor), tensor.requires_grad, *facts

    def check(self, *tensors):
        if len(tensors) != len(self.seen):
            raise TypeError("wrong length")
        unique = len({id(each) for each in tensors}) == len(tensors)
        return unique and [self._facts(each) for each in tensors] == self.seen


class Memory:
    """Gives out addresses that do not touch, and tensors on them."""

    def __init__(self):
        self.next = BASE

    def take(self, size):
        address = self.next
        self.next += (size + 4096) // 4096 * 4096 + 4096
        return address

    def tensor(self, shape, dtype, device=0, strides=None, offset=0):
        size = 16
        for extent in shape:
            size *= max(extent, 1)
        return Tensor(self.take(size * 4) + offset, shape, dtype, strides, device)


def fake_torch(memory, streams):
    """A module named torch; `streams` maps a device to its current stream."""
    torch = types.ModuleType("torch")
    torch.__version__ = "2.13.0"
    torch.Tensor = Tensor
    for name, dtype in _DTYPES.items():
        setattr(torch, name, dtype)
    torch._C = types.SimpleNamespace(
        _cuda_getCurrentRawStream=lambda device: streams.get(device, 0),
        _dynamo=types.SimpleNamespace(guards=types.SimpleNamespace(TensorGuards=TensorGuards)),
    )
    torch.empty = lambda shape, dtype, device: memory.tensor(shape, dtype.name, device)
    return torch
