"""The short way with tensors of torch itself, on the CPU: what its guard tells apart, and what never gets
there. `test_torch_call` has the same with a stand-in.
"""

from __future__ import annotations

import types

import pytest

from sm12x.ops import torch_call

torch = pytest.importorskip("torch", reason="torch is not installed")

M, N, K, E, ALL = 32, 16, 32, 4, 9


class Raw:
    """A plan that writes down what is launched."""

    device = 0
    needed = 1
    span_a = span_b = span_d = 0
    bounds_mask = index_mask = bias_mask = 0
    gathers = weighted = True
    workspace_bytes = 1 << 30

    def __init__(self):
        self.runs = []
        self.launches = types.SimpleNamespace(run=lambda *arguments: self.runs.append(arguments))


def tensors():
    """The arguments of a call with everything given, by name."""
    fp8 = torch.float8_e4m3fn
    return {
        "a": torch.zeros(M, K, dtype=torch.uint8).view(fp8),
        "b": torch.zeros(E, N, K, dtype=torch.uint8).view(fp8),
        "a_scale": torch.ones(M),
        "b_scale": torch.ones(E, N),
        "bounds": torch.zeros(E + 1, dtype=torch.int32),
        "row_index": torch.zeros(M, dtype=torch.int32),
        "row_weight": torch.ones(M),
        "out": torch.zeros(M, N, dtype=torch.bfloat16),
        "workspace": torch.zeros(4096, dtype=torch.uint8),
    }


def call(given):
    return torch_call.run_known_torch_call(*given.values(), False, "bfloat16", None, None, None, False)


@pytest.fixture
def plan(monkeypatch):
    """The plan of a call that is known."""
    monkeypatch.setattr(torch_call, "_calls", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77 + device, raising=False)
    plan = Raw()
    missed = call(tensors())
    assert missed is not None
    assert len(missed[1]) == ALL
    torch_call.remember_torch_call(plan, missed)
    assert plan.runs == []
    return plan


def test_fresh_tensors_of_a_known_call_are_launched_at_their_addresses(plan):
    given = tensors()
    assert call(given) is None
    (arguments,) = plan.runs
    names = ("a", "b", "out", "bounds", "row_index", "a_scale", "b_scale", None, "row_weight")
    base = -(-given["workspace"].data_ptr() // 256) * 256
    assert arguments[:2] == (77, base)
    assert arguments[2:11] == tuple(given[name].data_ptr() if name else 0 for name in names)


def test_views_at_other_addresses_are_the_same_call(plan):
    given = tensors()
    given["a"] = torch.zeros(3 * M, K, dtype=torch.uint8).view(torch.float8_e4m3fn)[M : 2 * M]
    given["b"] = given["b"][:]
    assert call(given) is None
    assert plan.runs[0][2] == given["a"].data_ptr()


def changes():
    """Every argument with something changed that its plan depends on."""
    for name, tensor in tensors().items():
        raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        longer = torch.cat([raw, raw]).view(tensor.dtype)
        yield name, "shape", longer
        yield name, "stride", longer[::2]
        yield name, "rank", tensor.unsqueeze(-1)
        yield name, "dtype", tensor.view(torch.int8) if tensor.element_size() == 1 else tensor.double()
        yield name, "device", tensor.to("meta")
        yield name, "type", torch.nn.Parameter(tensor, requires_grad=False)
        yield name, "nested", torch.nested.nested_tensor([torch.ones(3)])
        yield name, "sparse", torch.ones(tensor.shape).to_sparse()
        yield name, "number", 1.0
        if tensor.dtype == torch.float32:
            yield name, "negation", tensor._neg_view()
            yield name, "gradient", tensor.clone().requires_grad_()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(tensors()))
def test_a_tensor_that_differs_is_another_call(plan, name):
    checked = 0
    for argument, what, tensor in changes():
        if argument == name:
            assert call({**tensors(), name: tensor}) is not None, f"{name}: other {what}"
            checked += 1
    assert checked > ALL - 1
    assert plan.runs == []
    assert call(tensors()) is None


def test_tensors_of_a_transform_are_another_call(plan):
    missed = []

    def inside(a_scale):
        missed.append(call({**tensors(), "a_scale": a_scale}))
        return a_scale

    torch.vmap(inside)(torch.ones(3, M))
    torch.func.grad(lambda x: inside(x).sum())(torch.ones(M))
    assert None not in missed
    assert plan.runs == []


def test_a_tensor_whose_memory_is_gone_needs_a_closer_look(plan):
    given = tensors()
    given["b"].untyped_storage().resize_(0)
    assert call(given) is not None
    assert plan.runs == []


def test_calls_with_and_without_gradients_and_inference_are_each_remembered_once(plan):
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            missed = call(tensors())
            if missed is not None:
                torch_call.remember_torch_call(plan, missed)
            assert call(tensors()) is None
    (alike,) = torch_call._calls.values()
    assert len(alike) <= 2
