"""The short way of an expert layer with tensors of torch itself, on the CPU: what its guard tells apart.
`test_torch_layer_call` has the same with a stand-in.
"""

from __future__ import annotations

import types

import pytest

from sm12x.ops.torch_layer_call import remember, run_known

torch = pytest.importorskip("torch", reason="torch is not installed")

T, H, TOP = 4, 64, 2


class Layer:
    """A plan that writes down what is launched."""

    device = types.SimpleNamespace(ordinal=0)

    def __init__(self):
        self.known, self.runs, self.right = {}, [], True

    def looks_right(self, *addresses):
        return self.right

    def launch(self, *arguments):
        self.runs.append(arguments)


PLAN = types.SimpleNamespace(
    hand_over=False, call=types.SimpleNamespace(routes=types.SimpleNamespace(tokens=T))
)


def tensors(workspace=True):
    """The arrays of a call, by name."""
    return {
        "x": torch.zeros(T, H, dtype=torch.bfloat16),
        "topk_weights": torch.ones(T, TOP),
        "topk_ids": torch.zeros(T, TOP, dtype=torch.int32),
        "out": torch.zeros(T, H, dtype=torch.bfloat16),
        "workspace": torch.zeros(4096, dtype=torch.uint8) if workspace else None,
    }


@pytest.fixture(params=[True, False], ids=["workspace", "own memory"])
def layer(monkeypatch, request):
    """One whose call with such arrays is known."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77 + device, raising=False)
    layer = Layer()
    layer.given = request.param
    assert not run_known(layer, **tensors(layer.given))
    remember(layer, PLAN, **tensors(layer.given))
    return layer


def test_fresh_tensors_of_a_known_call_are_launched_at_their_addresses(layer):
    given = tensors(layer.given)
    given["x"] = torch.zeros(3 * T, H, dtype=torch.bfloat16)[T : 2 * T]
    assert run_known(layer, **given)
    space = given.pop("workspace")
    addresses = tuple(each.data_ptr() for each in given.values())
    assert layer.runs == [(PLAN, 77, addresses, space.data_ptr() if layer.given else None)]


def changed(name, tensor):
    """A tensor with something changed that its plan depends on."""
    longer = torch.cat([tensor, tensor])
    yield "shape", longer
    yield "stride", longer[::2]
    yield "rank", tensor.unsqueeze(-1)
    yield "dtype", tensor.view(torch.int8) if name == "workspace" else tensor.double()
    yield "device", tensor.to("meta")
    yield "type", torch.nn.Parameter(tensor, requires_grad=False)
    yield "nested", torch.nested.nested_tensor([torch.ones(3)])
    yield "sparse", torch.ones(tensor.shape).to_sparse()
    yield "number", 1.0
    if tensor.dtype.is_floating_point:
        yield "negation", tensor._neg_view()
        yield "gradient", tensor.clone().requires_grad_()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(tensors()))
def test_a_tensor_that_differs_is_another_call(layer, name):
    if tensors(layer.given)[name] is None:
        pytest.skip("calls without a workspace")
    for what, tensor in changed(name, tensors()[name]):
        assert not run_known(layer, **{**tensors(layer.given), name: tensor}), f"{name}: other {what}"
    assert layer.runs == []
    assert run_known(layer, **tensors(layer.given))


def test_tensors_of_a_transform_are_another_call(layer):
    known = []

    def inside(topk_weights):
        known.append(run_known(layer, **{**tensors(layer.given), "topk_weights": topk_weights}))
        return topk_weights

    torch.vmap(inside)(torch.ones(3, T, TOP))
    torch.func.grad(lambda x: inside(x).sum())(torch.ones(T, TOP))
    assert known == [False, False]
    assert layer.runs == []


def test_an_address_that_does_not_look_right_goes_the_long_way(layer):
    layer.right = False
    assert not run_known(layer, **tensors(layer.given))
    assert layer.runs == []


def test_arrays_that_are_not_all_of_torch_are_not_remembered(layer):
    layer.known.clear()
    remember(layer, PLAN, **{**tensors(layer.given), "topk_ids": [[0, 1]] * T})
    one = tensors(layer.given)
    remember(layer, PLAN, **{**one, "out": one["x"]})
    assert layer.known == {}
