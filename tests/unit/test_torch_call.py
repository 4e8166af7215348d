"""Packed calls on torch tensors that look like one before: what is skipped, and what never is."""

from __future__ import annotations

import random
import sys
import types

import pytest

import sm12x
from sm12x.ops import grouped_gemm as module
from sm12x.ops import packed as packed_module
from sm12x.ops import torch_call
from unit import fake_torch
from unit.fake_driver import CONTEXT, install
from unit.gemm_cases import STREAM, E, K, M, N, operands


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path)
    fake.streams[0] = STREAM
    return fake


def complete(fake, **more):
    """A call with everything given, on fresh tensors."""
    t = fake.tensor
    return {
        **operands(fake),
        "a_scale": t((M,), "float32"),
        "b_scale": t((E, N), "float32"),
        "workspace": t((sm12x.workspace_size(E),), "uint8"),
        **more,
    }


@pytest.fixture
def remembered(fake, monkeypatch):
    """A fake whose first call was made; taking an array in the long way fails from here on."""
    sm12x.grouped_gemm(**complete(fake))
    fake.launches.clear()

    def long_way(obj, name, stream):
        raise AssertionError(f"{name} was taken in")

    monkeypatch.setattr(module, "ingest", long_way)
    return fake


def test_a_call_like_one_before_launches_with_the_new_addresses(remembered):
    args = complete(remembered)
    remembered.streams[0] = STREAM + 64
    assert sm12x.grouped_gemm(**args) is args["out"]
    prepare, gemm = remembered.launches
    assert (prepare.stream, gemm.stream) == (STREAM + 64, STREAM + 64)
    p, g = prepare.params, gemm.params
    assert (p.a, p.b, p.d) == tuple(args[name].address for name in ("a", "b", "out"))
    assert (p.a_scale, p.b_scale, p.offsets) == tuple(
        args[name].address for name in ("a_scale", "b_scale", "offsets")
    )
    base = (args["workspace"].address + 255) // 256 * 256
    assert g.tensor_maps == base
    assert g.group_arrays == p.group_arrays > base
    assert remembered.allocated == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"a": ((M + 1, K), "float8_e4m3fn")},
        {"a": ((M, K), "float8_e5m2")},
        {"b": ((E, N, K), "float8_e4m3fn", 0, (2 * N * K, K, 1))},
        {"a_scale": ((M, 1), "float32")},
        {"b_scale": ((E, N), "float16")},
        {"offsets": ((E + 1,), "int64")},
        {"offsets": ((E + 1,), "int32", -1)},
        {"out": ((M, N), "float16")},
        {"workspace": ((64,), "uint8")},
        {"a": ((M, K), "float8_e4m3fn", 1)},
    ],
    ids=lambda changed: f"{next(iter(changed))}-{next(iter(changed.values()))}",
)
def test_a_call_that_differs_in_anything_but_addresses_is_looked_at_in_full(remembered, changed):
    tensors = {name: remembered.tensor(*spec) for name, spec in changed.items()}
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**complete(remembered, **tensors))
    assert remembered.launches == []


@pytest.mark.parametrize(
    "changed",
    [{"variant": "no such"}, {"dtype": "float8_e5m2"}, {"out_dtype": "float16"}, {"early_weights": True}],
)
def test_other_options_are_another_call(remembered, changed):
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**complete(remembered), **changed)


@pytest.mark.parametrize("early", [0, 1, None])
def test_what_is_no_bool_is_refused_though_it_equals_one(remembered, early):
    with pytest.raises(TypeError, match="early_weights: expected a bool"):
        sm12x.grouped_gemm(**complete(remembered), early_weights=early)
    assert remembered.launches == []


def test_a_lazily_negated_scale_is_not_mistaken_for_a_plain_one(remembered):
    args = complete(remembered)
    args["a_scale"].is_neg = lambda: True
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**args)


@pytest.mark.parametrize("name", ["a", "b", "out", "offsets", "a_scale", "b_scale"])
def test_a_misaligned_address_is_refused_in_a_remembered_call_too(fake, name):
    sm12x.grouped_gemm(**complete(fake))
    fake.launches.clear()
    args = complete(fake)
    args[name].address += 2
    with pytest.raises(ValueError, match=f"^{name}: "):
        sm12x.grouped_gemm(**args)
    assert fake.launches == []


def test_an_overlap_is_refused_in_a_remembered_call_too(fake):
    sm12x.grouped_gemm(**complete(fake))
    fake.launches.clear()
    args = complete(fake)
    args["out"].address = args["a"].address
    with pytest.raises(ValueError, match="^out: "):
        sm12x.grouped_gemm(**args)
    assert fake.launches == []


def test_weights_that_are_parameters_are_remembered_too(fake, monkeypatch):
    class Parameter(type(fake.tensor((1,), "uint8"))):
        __module__ = "torch.nn.parameter"

    def call():
        args = complete(fake)
        args["b"].__class__ = args["b_scale"].__class__ = Parameter
        return args

    sm12x.grouped_gemm(**call())
    fake.launches.clear()
    monkeypatch.setattr(module, "ingest", None)
    args = call()
    sm12x.grouped_gemm(**args)
    assert fake.launches[0].params.b == args["b"].address


def test_a_subclass_or_another_type_among_the_arrays_takes_the_long_way(remembered):
    class Other:
        pass

    for name in ("a", "b_scale", "offsets", "workspace"):
        with pytest.raises((AssertionError, TypeError)):
            sm12x.grouped_gemm(**complete(remembered, **{name: Other()}))
    assert remembered.launches == []


def test_a_tensor_without_memory_is_named_in_a_remembered_call_too(fake):
    sm12x.grouped_gemm(**complete(fake))
    fake.launches.clear()
    args = complete(fake)

    def no_storage():  # what the tensors of torch.vmap do, whose type is torch.Tensor
        raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")

    args["b"].data_ptr = no_storage
    with pytest.raises(TypeError, match=r"^b: .*doesn't have storage"):
        sm12x.grouped_gemm(**args)
    assert fake.launches == []


ARGUMENTS = ("a", "b", "a_scale", "b_scale", "offsets", "out", "workspace")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_nested_tensor_never_reaches_a_guard(remembered, name):
    args = complete(remembered)
    args[name].is_nested = True  # the fake's guard then raises Ended, torch's ends the process
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**args)
    assert remembered.launches == []


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_tensor_that_wants_a_gradient_is_looked_at_in_full(remembered, name):
    args = complete(remembered)
    args[name].requires_grad = True
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**args)


def test_calls_that_differ_in_what_a_guard_sees_only_are_all_remembered_each_with_its_own_plan(
    fake, monkeypatch
):
    wide = 2 * K
    kinds = [
        {},
        {"a": ((M, K), "float8_e4m3fn", 0, (wide, 1))},
        {"b": ((E, N, K), "float8_e4m3fn", 0, (N * wide, wide, 1))},
        {"a": ((M, wide), "float8_e4m3fn"), "b": ((E, N, wide), "float8_e4m3fn")},
        {"b_scale": ((E,), "float32")},
        {"offsets": ((E + 1,), "int64")},
    ]

    def call(kind):
        args = complete(fake, **{name: fake.tensor(*spec) for name, spec in kind.items()})
        fake.launches.clear()
        sm12x.grouped_gemm(**args)
        p = fake.launches[0].params
        assert (p.a, p.d) == (args["a"].address, args["out"].address)
        return p.stride_a, p.stride_b, p.stride_b_group, p.k, p.b_scale_mode, p.offsets_are_64_bit

    first = [call(kind) for kind in kinds]
    assert len(set(first)) == len(kinds)
    forbid_the_long_way(monkeypatch)
    for number in (5, 0, 3, 3, 1, 4, 2, 0, 5):
        assert call(kinds[number]) == first[number]


def test_a_device_s_call_is_not_taken_for_another_s(fake):
    fake.streams[1] = STREAM + 64

    def call(device):
        specs = {
            "a": ((M, K), "float8_e4m3fn"),
            "b": ((E, N, K), "float8_e4m3fn"),
            "offsets": ((E + 1,), "int32"),
            "a_scale": ((M,), "float32"),
            "b_scale": ((E, N), "float32"),
            "out": ((M, N), "bfloat16"),
            "workspace": ((sm12x.workspace_size(E),), "uint8"),
        }
        fake.launches.clear()
        sm12x.grouped_gemm(**{name: fake.tensor(*spec, device) for name, spec in specs.items()})
        return {(each.context, each.stream) for each in fake.launches}

    for device in (0, 1, 1, 0, 1):
        assert call(device) == {(CONTEXT + device, STREAM + 64 * device)}


def test_what_is_kept_of_calls_that_look_alike_has_an_end(fake):
    count = torch_call.MAX_ALIKE
    for step in range(1, count + 4):
        a = fake.tensor((M, K), "float8_e4m3fn", 0, (16 * step + K, 1))
        sm12x.grouped_gemm(**complete(fake, a=a))
        ((alike),) = torch_call._calls.values()
        assert len(alike) == min(step, count)


def test_one_tensor_as_both_scales_is_remembered(fake, monkeypatch):
    def call():
        one = fake.tensor((1,), "float32")
        args = complete(fake, a_scale=one, b_scale=one)
        fake.launches.clear()
        sm12x.grouped_gemm(**args)
        p = fake.launches[0].params
        assert p.a_scale == p.b_scale == one.address

    call()  # teaches the type of tensors
    call()
    forbid_the_long_way(monkeypatch)
    call()


def test_one_tensor_as_two_other_arguments_takes_the_long_way(fake):
    m = 32
    shapes = {"a": ((m, K), "float8_e4m3fn"), "out": ((m, N), "bfloat16"), "a_scale": ((m,), "float32")}
    for _ in range(3):
        args = complete(fake, **{name: fake.tensor(*spec) for name, spec in shapes.items()})
        args["b_scale"] = fake.tensor((E,), "float32")
        args["workspace"] = args["a_scale"] = fake.tensor((1,), "float32")
        with pytest.raises(ValueError, match="^workspace: expected at least"):
            sm12x.grouped_gemm(**args)


@pytest.mark.parametrize("missing", ["_dynamo", "_cuda_getCurrentRawStream"])
def test_a_torch_without_what_the_short_way_needs_takes_the_long_one(fake, missing):
    torch = sys.modules["torch"]
    delattr(torch._C, missing)
    torch.cuda = types.SimpleNamespace(
        current_stream=lambda device: types.SimpleNamespace(cuda_stream=fake.streams[device])
    )
    for _ in range(3):
        args = complete(fake)
        fake.launches.clear()
        sm12x.grouped_gemm(**args)
        assert fake.launches[0].params.a == args["a"].address
        assert {each.stream for each in fake.launches} == {STREAM}
    assert torch_call._calls == {}


class Placed:
    """A plan of a call whose arrays lie close together, that writes down what is launched."""

    def __init__(self, chance):
        self.device, self.runs = 0, []
        self.span_a, self.span_b, self.span_d = (16 * chance.randrange(1, 4) for _ in range(3))
        self.needed = chance.choice((0, 0, 32, 64))
        self.workspace_bytes = 512
        self.bounds_mask, self.index_mask, self.bias_mask = chance.choice((3, 7)), chance.choice((3, 7)), 0
        self.gathers = self.weighted = chance.random() < 0.5
        self.launches = types.SimpleNamespace(run=lambda *given: self.runs.append(given))


def test_a_known_call_is_launched_just_where_its_addresses_are_not_suspicious(fake):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    seen = {True: 0, False: 0}
    for _ in range(4000):
        plan = Placed(chance)
        names = ["a", "b", "a_scale", "b_scale", "bounds", "row_index", "row_weight", "out", "workspace"]
        start = 0x7F00_0000_0000
        odd = chance.choice((0, 0, 0.1))  # how many addresses are anything
        given = {}
        for name in names:
            address = start + 16 * chance.randrange(64)
            if chance.random() < odd:
                address = chance.choice((0, address + chance.randrange(16)))
            given[name] = fake_torch.Tensor(address, (len(given) + 1,), "uint8")
        if not plan.gathers:
            given["row_index"] = given["row_weight"] = None
        options = (False, "bfloat16", None, None, None, False)
        torch_call._calls.clear()
        torch_call.remember_torch_call(plan, torch_call.run_known_torch_call(*given.values(), *options))
        (known,) = torch_call._calls.values()
        assert len(known) == 1
        at = {name: 0 if tensor is None else tensor.address for name, tensor in given.items()}
        scratch = at["workspace"] if plan.needed else 0
        bad = packed_module.suspicious(
            *(plan, at["a"], at["b"], at["out"], at["bounds"], at["row_index"], at["a_scale"]),
            *(at["b_scale"], 0, at["row_weight"], scratch, (scratch + 255) & -256),
        )
        launched = torch_call.run_known_torch_call(*given.values(), *options) is None
        assert launched is not bad, (at, vars(plan))
        assert len(plan.runs) == launched
        seen[bad] += 1
    assert min(seen.values()) > 400


# The family fp8_packed: one launch, with rows gathered, weighted or masked.

T, MAX_M = 7, 24


def gathered(fake, **more):
    t = fake.tensor
    return complete(
        fake,
        a=t((T, K), "float8_e4m3fn"),
        a_scale=t((T,), "float32"),
        row_index=t((M,), "int32"),
        row_weight=t((M,), "float32"),
        **more,
    )


def masked(fake, **more):
    t = fake.tensor
    args = complete(
        fake,
        a=t((E, MAX_M, K), "float8_e4m3fn"),
        a_scale=t((E, MAX_M), "float32"),
        out=t((E, MAX_M, N), "bfloat16"),
        rows=t((E,), "int32"),
        row_weight=t((E, MAX_M), "float32"),
        expected_m=3,
    )
    del args["offsets"]
    return {**args, **more}


@pytest.fixture
def packed(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path, packed=True)
    fake.streams[0] = STREAM
    return fake


def forbid_the_long_way(monkeypatch):
    def long_way(obj, name, stream):
        raise AssertionError(f"{name} was taken in")

    monkeypatch.setattr(module, "ingest", long_way)


@pytest.mark.parametrize("make", [complete, gathered, masked])
@pytest.mark.parametrize("mode", ["whole", "split"])
@pytest.mark.parametrize("scratch", [True, False])
def test_every_layout_is_remembered(packed, monkeypatch, make, mode, scratch):
    options = {"variant": f"fp8_packed_128x8x128_swap:{mode}"}
    if not scratch:
        options["workspace"] = None
    sm12x.grouped_gemm(**make(packed, **options))
    packed.launches.clear()
    forbid_the_long_way(monkeypatch)
    args = make(packed, **options)
    packed.streams[0] = STREAM + 64
    assert sm12x.grouped_gemm(**args) is args["out"]
    (gemm,) = packed.launches
    p = gemm.params
    assert gemm.stream == STREAM + 64
    assert (p.a, p.d) == (args["a"].address, args["out"].address)
    assert p.bounds == args["offsets" if "offsets" in args else "rows"].address
    assert (p.a_scale, p.b_scale) == (args["a_scale"].address, args["b_scale"].address)
    for name in ("row_index", "row_weight"):
        assert getattr(p, name) == (args[name].address if name in args else 0)
    assert (p.partials != 0, p.counters != 0) == (mode == "split", mode == "split")


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (gathered, {"row_index": ((M,), "int64")}),
        (gathered, {"row_index": ((M,), "int32", -1)}),
        (gathered, {"row_index": ((M + 1,), "int32")}),
        (gathered, {"row_index": ((M,), "int32", 0, (2,))}),
        (gathered, {"row_index": None}),
        (gathered, {"row_weight": None}),
        (gathered, {"row_weight": ((M, 1), "float32")}),
        (gathered, {"row_weight": ((M,), "float16")}),
        (gathered, {"row_weight": ((M,), "float32", 1)}),
        (gathered, {"workspace": None}),
        (gathered, {"a": ((T + 1, K), "float8_e4m3fn")}),
        (masked, {"rows": ((E,), "int64")}),
        (masked, {"rows": ((E,), "int32", 1)}),
        (masked, {"row_weight": None}),
        (complete, {"row_index": ((M,), "int32")}),
        (complete, {"row_weight": ((M,), "float32")}),
    ],
    ids=str,
)
def test_a_call_with_other_rows_is_another_call(packed, monkeypatch, make, changed):
    sm12x.grouped_gemm(**make(packed))
    packed.launches.clear()
    forbid_the_long_way(monkeypatch)
    edits = {name: None if spec is None else packed.tensor(*spec) for name, spec in changed.items()}
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**{**make(packed), **edits})
    assert packed.launches == []


@pytest.mark.parametrize("changed", [{"expected_m": 4}, {"expected_m": None}, {"variant": None}])
def test_a_masked_call_with_other_options_is_another_call(packed, monkeypatch, changed):
    options = {"variant": "fp8_packed_128x8x128_swap"}
    sm12x.grouped_gemm(**masked(packed, **options))
    forbid_the_long_way(monkeypatch)
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**{**masked(packed, **options), **changed})


def test_a_lazily_negated_weight_is_not_mistaken_for_a_plain_one(packed, monkeypatch):
    sm12x.grouped_gemm(**gathered(packed))
    forbid_the_long_way(monkeypatch)
    args = gathered(packed)
    args["row_weight"].is_neg = lambda: True
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**args)


@pytest.mark.parametrize("name", ["row_index", "row_weight", "rows"])
def test_nested_rows_never_reach_a_guard(packed, monkeypatch, name):
    make = masked if name == "rows" else gathered
    sm12x.grouped_gemm(**make(packed))
    packed.launches.clear()
    forbid_the_long_way(monkeypatch)
    args = make(packed)
    args[name].is_nested = True
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**args)
    assert packed.launches == []


def test_calls_with_more_or_fewer_arrays_are_all_remembered(packed, monkeypatch):
    absents = [(), ("workspace",), ("row_index",), ("row_weight",), ("workspace", "row_index", "row_weight")]

    def call(absent):
        args = gathered(packed)
        if "row_index" in absent:
            args["a"] = packed.tensor((M, K), "float8_e4m3fn")
            args["a_scale"] = packed.tensor((M,), "float32")
        sm12x.grouped_gemm(**{**args, **dict.fromkeys(absent)})

    for absent in absents:
        call(absent)
    forbid_the_long_way(monkeypatch)
    packed.launches.clear()
    for absent in absents[::-1] + absents:
        call(absent)
    assert len(packed.launches) == 2 * len(absents)


@pytest.mark.parametrize("absent", ["row_index", "row_weight"])
def test_an_index_and_a_weight_do_not_stand_for_each_other(packed, absent):
    """One of the two is given, as many tensors either way."""

    def call(absent):
        args = gathered(packed)
        args["a"] = packed.tensor((M, K), "float8_e4m3fn")
        args["a_scale"] = packed.tensor((M,), "float32")
        args[absent] = None
        packed.launches.clear()
        sm12x.grouped_gemm(**args)
        p = packed.launches[0].params
        for name in ("row_index", "row_weight"):
            assert getattr(p, name) == (0 if name == absent else args[name].address)

    other = {"row_index": "row_weight", "row_weight": "row_index"}[absent]
    for each in (absent, other, absent, absent, other, other):
        call(each)


@pytest.mark.parametrize("name", ["row_index", "row_weight", "rows"])
@pytest.mark.parametrize("address", [None, 0])
def test_a_bad_address_of_rows_is_refused_in_a_remembered_call_too(packed, name, address):
    make = masked if name == "rows" else gathered
    sm12x.grouped_gemm(**make(packed))
    packed.launches.clear()
    args = make(packed)
    args[name].address = args[name].address + 2 if address is None else address
    with pytest.raises(ValueError, match=f"^{name}: "):
        sm12x.grouped_gemm(**args)
    assert packed.launches == []


def test_offsets_beside_rows_are_refused_in_a_remembered_call_too(packed):
    sm12x.grouped_gemm(**masked(packed))
    packed.launches.clear()
    with pytest.raises(ValueError, match="^offsets: expected None where rows is given"):
        sm12x.grouped_gemm(**masked(packed), offsets=packed.tensor((E + 1,), "int32"))
    assert packed.launches == []


def test_counts_given_as_offsets_are_refused_in_a_remembered_call_too(packed):
    sm12x.grouped_gemm(**masked(packed, expected_m=None))
    packed.launches.clear()
    args = masked(packed, expected_m=None)
    args["offsets"] = args.pop("rows")
    with pytest.raises(ValueError, match=r"^a: expected shape \(M, K\)"):
        sm12x.grouped_gemm(**args)
    assert packed.launches == []


def test_a_misaligned_or_overlapping_operand_is_refused_in_a_remembered_call_too(packed):
    sm12x.grouped_gemm(**gathered(packed))
    packed.launches.clear()
    args = gathered(packed)
    args["a"].address += 8
    with pytest.raises(ValueError, match="^a: expected an address"):
        sm12x.grouped_gemm(**args)
    args = gathered(packed)
    args["out"].address = args["b"].address
    with pytest.raises(ValueError, match="^out: expected memory of its own"):
        sm12x.grouped_gemm(**args)
    assert packed.launches == []
