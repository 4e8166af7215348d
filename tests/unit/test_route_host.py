"""`route` on a fake driver: what it launches, with which parameters, and what it refuses."""

from __future__ import annotations

import pytest

import sm12x
from sm12x import abi, outputs
from sm12x.errors import CudaError
from unit.fake_driver import CONTEXT, install
from unit.fake_jax import ArrayImpl, DlpackArray, install_jax
from unit.layer_params import facts

E, T, TOP = 6, 5, 2
STREAM = 0x7F12_3456_7890


@pytest.fixture
def fake(monkeypatch, layer_root):
    fake = install(monkeypatch, layer_root)
    fake.streams[0] = STREAM
    return fake


def routes(fake, count=T, top_k=TOP, dtype="int32"):
    return fake.tensor((count, top_k), dtype)


def expected(ids, made, **more):
    """All of sm12x_route_params. No tokens are quantised, nothing is cleared for GEMMs."""
    names = [name for name, *_ in abi.sm12x_quantize_params._fields_]
    count, top_k = ids.extents
    return {
        **{f"tokens.{name}": 0 for name in names},
        "topk_ids": ids.address,
        "topk_weights": 0,
        "expert_map": 0,
        "offsets": made.offsets.address,
        "row_index": made.row_index.address,
        "route_row": made.route_row.address,
        "row_weight": 0 if made.row_weight is None else made.row_weight.address,
        "row_maxima": 0,
        "counts": 0,
        "padded": 0,
        "routes": count * top_k,
        "top_k": top_k,
        "num_experts": E,
        "map_size": 0,
        "ids_are_64_bit": 0,
        "phase": abi.SM12X_ROUTE_ALL,
        "route_ctas": 1,
        "padded_bytes": 0,
        "padding": 0,
        "early": 0,
        **more,
    }


def test_few_routes_are_one_launch(fake):
    ids = routes(fake)
    made = sm12x.route(ids, E)
    (launched,) = fake.launches
    assert (launched.symbol, launched.grid, launched.block) == ("sm12x_moe_route", (1, 1, 1), (512, 1, 1))
    assert (launched.stream, launched.context, launched.programmatic) == (STREAM, CONTEXT, True)
    assert facts(launched.params) == expected(ids, made)
    assert fake.allocated == fake.kept == {}
    assert fake.context == 0
    described = [(x.shape, x.dtype.name, x.get_device()) for x in made if x is not None]
    assert described == [((E + 1,), "int32", 0), ((T * TOP,), "int32", 0), ((T, TOP), "int32", 0)]
    assert made.row_weight is None


def test_weights_a_map_and_wide_ids(fake):
    ids, weights = routes(fake, dtype="int64"), fake.tensor((T, TOP), "float32")
    experts = fake.tensor((40,), "int32")
    made = sm12x.route(ids, E, topk_weights=weights, expert_map=experts)
    more = {"topk_weights": weights.address, "expert_map": experts.address, "map_size": 40}
    assert facts(fake.launches[0].params) == expected(ids, made, ids_are_64_bit=1, **more)
    assert (made.row_weight.shape, made.row_weight.dtype.name) == ((T * TOP,), "float32")


@pytest.mark.parametrize(("count", "ctas"), [(4096, 1), (4097, 2), (8192, 2), (8193, 3)])
def test_many_routes_are_counted_and_then_placed(fake, count, ctas):
    ids = routes(fake, count)
    made = sm12x.route(ids, E)
    if ctas == 1:
        assert len(fake.launches) == 1
        return
    (address,) = fake.allocated
    assert fake.allocated[address] == 4 * ctas * E
    kinds = [entry[0] for entry in fake.log]
    assert kinds == ["alloc", "launch", "launch", "free"]
    assert {entry[-1] for entry in fake.log} == {STREAM}
    for launched, phase in zip(fake.launches, ("COUNT", "PLACE"), strict=True):
        assert launched.grid == (ctas, 1, 1)
        phase = getattr(abi, f"SM12X_ROUTE_{phase}")
        more = {"counts": address, "phase": phase, "route_ctas": ctas}
        assert facts(launched.params) == expected(ids, made, **more)


def test_no_tokens_still_have_offsets(fake):
    ids = routes(fake, 0)
    ids.address = 0
    made = sm12x.route(ids, E)
    (launched,) = fake.launches
    assert (launched.params.routes, launched.params.offsets) == (0, made.offsets.address)
    assert made.route_row.shape == (0, TOP)


def test_the_current_stream_and_another_device(fake):
    fake.streams[1] = STREAM + 16
    sm12x.route(fake.tensor((T, TOP), "int32", 1), E)
    sm12x.route(routes(fake), E, stream=STREAM)
    assert [(x.stream, x.context) for x in fake.launches] == [(STREAM + 16, CONTEXT + 1), (STREAM, CONTEXT)]


def test_an_explicit_stream_is_not_the_frameworks(fake, monkeypatch):
    install_jax(monkeypatch, fake)
    sm12x.route(ArrayImpl(fake, (T, TOP), "int32"), E, stream=STREAM + 32)
    assert [x.stream for x in fake.launches] == [STREAM + 32]


def at(tensor, address):
    tensor.address = address
    return tensor


BAD = {
    "misaligned": lambda x, by: at(x, x.address + by),
    "null": lambda x, by: at(x, 0),
}


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize(
    ("name", "dtype", "by", "multiple"),
    [
        *[("topk_ids", "int32", 2, 4), ("topk_ids", "int64", 4, 8)],
        *[("topk_weights", "int32", 2, 4), ("expert_map", "int32", 2, 4)],
    ],
)
def test_bad_addresses_name_the_argument(fake, how, name, dtype, by, multiple):
    call = {
        "topk_ids": routes(fake, dtype=dtype),
        "topk_weights": fake.tensor((T, TOP), "float32"),
        "expert_map": fake.tensor((9,), "int32"),
    }
    BAD[how](call[name], by)
    words = f"a multiple of {multiple} bytes" if how == "misaligned" else "has memory, got address 0"
    with pytest.raises(ValueError, match=f"^{name}: expected .*{words}"):
        sm12x.route(call.pop("topk_ids"), E, **call)
    assert fake.launches == []


@pytest.mark.parametrize("name", ["topk_weights", "expert_map"])
@pytest.mark.parametrize("device", [1, -1])
def test_arrays_of_another_device(fake, name, device):
    shape, dtype = ((T, TOP), "float32") if name == "topk_weights" else ((9,), "int32")
    with pytest.raises(ValueError, match=f"^{name}: expected memory of CUDA device 0 like topk_ids"):
        sm12x.route(routes(fake), E, **{name: fake.tensor(shape, dtype, device)})
    assert fake.launches == []


def test_none_is_no_array(fake):
    with pytest.raises(TypeError, match="^topk_ids: expected an array"):
        sm12x.route(None, E)


@pytest.mark.parametrize(("count", "statuses"), [(T, [719]), (5000, [719]), (5000, [0, 719])])
def test_a_failed_launch_is_an_error_with_everything_in_it(fake, count, statuses):
    fake.fail["cuLaunchKernelEx"] = statuses
    with pytest.raises(CudaError, match="cuLaunchKernelEx failed with .*719") as caught:
        sm12x.route(routes(fake, count), E)
    assert caught.value.variant == "moe_route"
    assert caught.value.shapes == f"topk_ids ({count}, {TOP}) int32, {E} experts"
    assert list(fake.allocated) == fake.freed
    assert fake.context == 0


@pytest.mark.parametrize("which", ["topk_ids", "expert_map"])
def test_jax_arrays_are_handed_over_on_both_sides(fake, monkeypatch, which):
    """Also where only an input is JAX's: it is held until the kernel has read it."""
    install_jax(monkeypatch, fake)
    monkeypatch.setattr(fake.bindings, "cuEventQuery", lambda event: (fake.bindings.CUresult(600),))
    ids, experts = routes(fake), fake.tensor((9,), "int32")
    if which == "topk_ids":
        ids = ArrayImpl(fake, (T, TOP), "int32")
    else:
        experts = ArrayImpl(fake, (9,), "int32")
    made = sm12x.route(ids, E, expert_map=experts)
    (launched,) = fake.launches
    if which == "topk_ids":
        assert [kind for kind, _ in made[:3]] == ["imported"] * 3
        assert launched.params.offsets == made.offsets[1].tensor.address
        assert launched.stream > 2
    else:
        assert launched.params.offsets == made.offsets.address
    assert made.row_weight is None
    (held,) = outputs._held
    assert len(held.owners[0]) == 1
    kinds = [entry[0] for entry in fake.log]
    assert kinds.index("launch") < kinds.index("record")


def test_dlpack_producers_bring_no_allocator(fake):
    with pytest.raises(TypeError, match="dlpack arrays bring no allocator"):
        sm12x.route(DlpackArray(fake, (T, TOP), "int32"), E)
    assert fake.launches == []
