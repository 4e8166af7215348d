"""What a call launches in the family fp8_packed, with which parameters, on a fake driver."""

from __future__ import annotations

import struct

import pytest

import sm12x
from sm12x import abi, counters, manifest
from sm12x.ops import fp8_packed, launch
from sm12x.ops import grouped_gemm as module
from unit.fake_driver import CONTEXT, install
from unit.gemm_cases import PREPARE, STREAM, E, K, M, N, nothing_happened, operands

KEY = "fp8_packed_128x8x128_swap"
WHOLE, SPLIT = f"{KEY}:whole", f"{KEY}:split"
MAX_M = 24
T = 7  # tokens, where rows are gathered


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path, packed=True)
    fake.streams[0] = STREAM
    return fake


def masked(fake, e=E, most=MAX_M, **more):
    """A masked call with `out`."""
    t = fake.tensor
    return {
        "a": t((e, most, K), "float8_e4m3fn"),
        "b": t((e, N, K), "float8_e4m3fn"),
        "rows": t((e,), "int32"),
        "out": t((e, most, N), "bfloat16"),
        **more,
    }


def gathered(fake, **more):
    """A packed call whose M rows come out of T tokens."""
    t = fake.tensor
    return operands(fake, a=t((T, K), "float8_e4m3fn"), row_index=t((M,), "int32"), **more)


def address_of(tensor_map):
    """Where a map of the fake driver points."""
    return struct.unpack_from("<Q", bytes(tensor_map), 120)[0]


def weight_addresses(p):
    """Where the maps of b point that have ever been written."""
    return [address_of(each) for each in p.map_b if any(bytes(each))]


def text_of(tensor_map):
    return bytes(tensor_map)[:120].rstrip(b"\0").decode()


def only_launch(fake):
    (launched,) = fake.launches
    return launched


def test_a_packed_call_is_one_launch_without_a_workspace(fake):
    args = operands(fake, a_scale=fake.tensor((M,), "float32"), b_scale=fake.tensor((E, N), "float32"))
    assert sm12x.grouped_gemm(**args, variant=WHOLE) is args["out"]
    gemm = only_launch(fake)
    variant = manifest.default().variants[KEY]
    assert (gemm.symbol, gemm.stream, gemm.context) == (f"sm12x_{KEY}", STREAM, CONTEXT)
    assert (gemm.block, gemm.shared_memory) == ((variant.threads, 1, 1), variant.shared_memory)
    p = gemm.params
    assert (p.a, p.d, p.bounds) == tuple(args[name].address for name in ("a", "out", "offsets"))
    assert (p.a_scale, p.b_scale) == (args["a_scale"].address, args["b_scale"].address)
    assert (p.a_scale_mode, p.b_scale_mode) == (abi.SM12X_SCALE_VECTOR, abi.SM12X_SCALE_VECTOR)
    assert (p.row_index, p.row_weight, p.bias, p.partials, p.counters) == (0, 0, 0, 0, 0)
    assert (p.rows, p.a_rows, p.n, p.k, p.num_groups) == (M, M, N, K, E)
    assert (p.stride_a, p.stride_d, p.stride_d_group, p.stride_b_scale) == (K, N, 0, N)
    assert (p.row_layout, p.bounds_are_64_bit, p.least_units) == (abi.SM12X_ROWS_PACKED, 0, 0)
    assert (p.out_type, p.bias_type) == (abi.SM12X_OUT_BFLOAT16, 0)
    # The maps lie over the arrays themselves: UINT8, three dimensions, swizzle and L2 promotion of 128 bytes.
    assert text_of(p.map_a) == f"0 3 [{K}, {M}, 1] [{K}, {K}] [128, 8, 1] 3 2"
    assert address_of(p.map_a) == args["a"].address
    # Those of the weights differ in their boxes; the last one is not used.
    for each, features in zip(p.map_b, (8, 16, 32, 64, 128), strict=False):
        assert text_of(each) == f"0 3 [{K}, {N}, {E}] [{K}, {N * K}] [128, {features}, 1] 3 2"
    assert weight_addresses(p) == [args["b"].address] * 5
    assert fake.allocated == fake.kept == {}
    assert fake.context == 0, "the caller's context is put back"


def test_the_second_call_replaces_what_changed_and_nothing_else(fake):
    fake.context = CONTEXT
    first = operands(fake)
    sm12x.grouped_gemm(**first, variant=WHOLE)
    fake.calls.clear()
    later = operands(fake, b=first["b"])
    sm12x.grouped_gemm(**later, variant=WHOLE)
    assert fake.calls == ["cuCtxGetCurrent", "cuTensorMapReplaceAddress", "cuLaunchKernelEx"]
    p = fake.launches[-1].params
    assert address_of(p.map_a) == p.a == later["a"].address
    assert weight_addresses(p) == [first["b"].address] * 5
    fake.calls.clear()
    again = operands(fake, a=later["a"])
    sm12x.grouped_gemm(**again, variant=WHOLE)
    # New weights: all their maps.
    assert fake.calls == ["cuCtxGetCurrent", *["cuTensorMapReplaceAddress"] * 5, "cuLaunchKernelEx"]
    p = fake.launches[-1].params
    assert address_of(p.map_a) == later["a"].address
    assert weight_addresses(p) == [again["b"].address] * 5
    assert len(module._plans) == 1


def test_weights_that_came_before_cost_no_driver_call(fake):
    fake.context = CONTEXT
    layers = [operands(fake) for _ in range(4)]
    a = layers[0]["a"]
    made = []
    for layer in layers:
        sm12x.grouped_gemm(**{**layer, "a": a}, variant=WHOLE)
        made.append([bytes(each) for each in fake.launches[-1].params.map_b])
    fake.calls.clear()
    for number in (2, 0, 0, 3, 1):
        sm12x.grouped_gemm(**{**layers[number], "a": a}, variant=WHOLE)
        p = fake.launches[-1].params
        assert [bytes(each) for each in p.map_b] == made[number]
        assert weight_addresses(p) == [layers[number]["b"].address] * 5
    assert fake.calls == ["cuCtxGetCurrent", "cuLaunchKernelEx"] * 5


def test_the_maps_of_weights_that_are_kept_have_an_end(fake, monkeypatch):
    monkeypatch.setattr(fp8_packed, "MOST_WEIGHTS", 3)
    layers = [operands(fake) for _ in range(7)]
    for layer in layers + layers[::-1]:
        sm12x.grouped_gemm(**layer, variant=WHOLE)
        assert weight_addresses(fake.launches[-1].params) == [layer["b"].address] * 5
        (plan,) = module._plans.values()
        assert 0 < len(plan.launches.weights) <= 3


def test_maps_of_weights_that_were_written_in_part_are_not_kept(fake):
    args = operands(fake)
    fake.fail["cuTensorMapReplaceAddress"] = [0, 0, 0, 719]
    with pytest.raises(sm12x.CudaError, match=r"cuTensorMapReplaceAddress failed.*719"):
        sm12x.grouped_gemm(**args, variant=WHOLE)
    sm12x.grouped_gemm(**args, variant=WHOLE)
    assert weight_addresses(only_launch(fake).params) == [args["b"].address] * 5


def test_a_stream_of_its_own_for_every_call(fake):
    for stream in (STREAM, STREAM + 64, 0, STREAM):
        fake.streams[0] = stream
        sm12x.grouped_gemm(**operands(fake), variant=WHOLE)
        assert fake.launches[-1].stream == stream


@pytest.mark.parametrize("stem", ["128x8x128_swap", "128x32x128_swap", "128x16x64_swap", "128x128x128_coop"])
def test_the_attribute_of_programmatic_launch_is_the_manifests(fake, stem):
    sm12x.grouped_gemm(**operands(fake), variant=f"fp8_packed_{stem}:whole")
    gemm = only_launch(fake)
    assert gemm.programmatic == manifest.default().variants[f"fp8_packed_{stem}"].pdl
    k_tile = int(stem.split("_")[0].split("x")[2])
    boxes = (8, 16, 32, 64, 128, None) if stem.endswith("swap") else (128, *(None,) * 5)
    for each, features in zip(gemm.params.map_b, boxes, strict=True):
        if features is None:
            assert bytes(each) == bytes(128)
        else:
            assert text_of(each).endswith(f"[{k_tile}, {features}, 1] {3 if k_tile == 128 else 2} 2")


@pytest.mark.parametrize("layout", [operands, gathered, masked])
def test_weights_are_loaded_early_where_the_call_says_so(fake, layout):
    """Each call for itself: plans know it, and so do remembered ones."""
    args = layout(fake)
    for early in (False, True, False, True, True):
        options = {"early_weights": True} if early else {}
        sm12x.grouped_gemm(**args, **options)
        assert fake.launches[-1].params.flags == (abi.SM12X_EARLY_WEIGHTS if early else 0)


@pytest.mark.parametrize(
    ("dtype", "code"), [("float32", "FLOAT32"), ("bfloat16", "BFLOAT16"), ("float16", "FLOAT16")]
)
def test_all_three_types_of_results(fake, dtype, code):
    sm12x.grouped_gemm(**operands(fake, out=fake.tensor((M, N), dtype)), out_dtype=dtype, variant=WHOLE)
    assert only_launch(fake).params.out_type == getattr(abi, f"SM12X_OUT_{code}")


def test_float32_results_without_forcing_anything(fake):
    sm12x.grouped_gemm(**operands(fake, out=fake.tensor((M, N), "float32")), out_dtype="float32")
    assert only_launch(fake).symbol.startswith("sm12x_fp8_packed_")


@pytest.mark.parametrize(("dtype", "wide"), [("int32", 0), ("int64", 1)])
def test_gathered_rows_have_an_index_and_no_map(fake, dtype, wide):
    args = gathered(fake, a_scale=fake.tensor((T,), "float32"))
    args["row_index"] = fake.tensor((M,), dtype)
    sm12x.grouped_gemm(**args, variant=WHOLE)
    p = only_launch(fake).params
    assert (p.row_index, p.row_index_is_64_bit) == (args["row_index"].address, wide)
    assert (p.a, p.a_rows, p.rows) == (args["a"].address, T, M)
    assert p.a_scale_mode == abi.SM12X_SCALE_VECTOR
    assert bytes(p.map_a) == bytes(128)
    assert weight_addresses(p) == [args["b"].address] * 5
    assert fake.calls.count("cuTensorMapEncodeTiled") == 5
    assert fake.calls.count("cuTensorMapReplaceAddress") == 5


def test_gathering_out_of_no_tokens_at_all(fake):
    args = gathered(fake)
    args["a"] = fake.tensor((0, K), "float8_e4m3fn")
    args["a"].address = 0
    sm12x.grouped_gemm(**args)
    assert (only_launch(fake).params.a_rows, only_launch(fake).params.rows) == (0, M)


def test_without_out_the_result_has_a_row_for_each_index(fake):
    args = gathered(fake)
    del args["out"]
    assert sm12x.grouped_gemm(**args).shape == (M, N)
    args = masked(fake)
    del args["out"]
    assert sm12x.grouped_gemm(**args).shape == (E, MAX_M, N)


@pytest.mark.parametrize("shape", [(M,), (M, 1)])
def test_row_weights_of_a_packed_call(fake, shape):
    weight = fake.tensor(shape, "float32")
    sm12x.grouped_gemm(**operands(fake, row_weight=weight), variant=WHOLE)
    assert only_launch(fake).params.row_weight == weight.address


def test_a_masked_call_has_groups_of_its_own(fake):
    args = masked(fake, a_scale=fake.tensor((E, MAX_M), "float32"), expected_m=4)
    args["row_weight"] = fake.tensor((E, MAX_M, 1), "float32")
    sm12x.grouped_gemm(**args, variant=WHOLE)
    p = only_launch(fake).params
    assert (p.bounds, p.bounds_are_64_bit) == (args["rows"].address, 0)
    assert (p.row_layout, p.rows, p.a_rows, p.num_groups) == (abi.SM12X_ROWS_MASKED, MAX_M, MAX_M, E)
    assert (p.stride_d, p.stride_d_group) == (N, MAX_M * N)
    assert p.a_scale_mode == abi.SM12X_SCALE_VECTOR
    assert p.row_weight == args["row_weight"].address
    assert text_of(p.map_a).startswith(f"0 3 [{K}, {MAX_M}, {E}] [{K}, {MAX_M * K}]")


def test_masked_arrays_may_be_strided_or_have_groups_between_rows(fake):
    t = fake.tensor
    a = t((E, MAX_M, K), "float8_e4m3fn", strides=(K + 16, E * (K + 16), 1))
    out = t((E, MAX_M, N), "bfloat16", strides=(N + 8, E * (N + 8), 1))
    rows = t((E,), "int64")
    sm12x.grouped_gemm(**masked(fake, a=a, out=out, rows=rows), variant=WHOLE)
    p = only_launch(fake).params
    assert text_of(p.map_a).startswith(f"0 3 [{K}, {MAX_M}, {E}] [{E * (K + 16)}, {K + 16}]")
    assert (p.stride_d, p.stride_d_group, p.bounds_are_64_bit) == (E * (N + 8), N + 8, 1)


@pytest.mark.parametrize(
    ("shape", "mode"),
    [((E, 1, 1), "GROUP"), ((1,), "ONE"), ((1, 1, 1), "ONE"), ((E, MAX_M), "VECTOR"), (None, "VALUE")],
)
def test_scales_of_a_masked_call(fake, shape, mode):
    scale = 0.25 if shape is None else fake.tensor(shape, "float32")
    sm12x.grouped_gemm(**masked(fake, a_scale=scale), variant=WHOLE)
    p = only_launch(fake).params
    assert p.a_scale_mode == getattr(abi, f"SM12X_SCALE_{mode}")
    assert (p.a_scale, p.a_scale_value) == ((0, 0.25) if shape is None else (scale.address, 1.0))


def test_values_are_not_cached_with_the_plan(fake):
    for value in (0.5, 2.0):
        sm12x.grouped_gemm(**operands(fake, a_scale=value, b_scale=-value), variant=WHOLE)
        p = fake.launches[-1].params
        assert (p.a_scale_value, p.b_scale_value) == (value, -value)
    assert len(module._plans) == 1


def test_one_expert_and_one_row(fake):
    sm12x.grouped_gemm(**operands(fake, m=1, e=1), variant=WHOLE)
    sm12x.grouped_gemm(**masked(fake, e=1, most=1), variant=WHOLE)
    packed, masked_call = (each.params for each in fake.launches)
    assert text_of(packed.map_b[0]).startswith(f"0 3 [{K}, {N}, 1] [{K}, {N * K}]")
    assert text_of(masked_call.map_a).startswith(f"0 3 [{K}, 1, 1] [{K}, {K}]")


@pytest.mark.parametrize(("m", "e"), [(0, E), (0, 0)])
def test_nothing_to_do_launches_nothing(fake, m, e):
    sm12x.grouped_gemm(**operands(fake, m=m, e=e))
    sm12x.grouped_gemm(**masked(fake, e=e, most=0))
    assert nothing_happened(fake)


def test_bias_travels_with_its_type_and_stride(fake):
    bias = fake.tensor((E, N), "float16", strides=(N + 8, 1))
    sm12x.grouped_gemm(**operands(fake, bias=bias), variant=WHOLE)
    p = only_launch(fake).params
    assert (p.bias, p.bias_type, p.stride_bias) == (bias.address, abi.SM12X_BIAS_FLOAT16, N + 8)


# Split-K.


def test_split_k_has_partials_in_the_workspace_and_zeroed_counters_elsewhere(fake):
    workspace = fake.tensor((sm12x.workspace_size(E) + 256,), "uint8", offset=16)
    sm12x.grouped_gemm(**operands(fake, workspace=workspace), variant=SPLIT)
    gemm = only_launch(fake)
    variant = manifest.default().variants[KEY]
    p = gemm.params
    assert p.least_units > 0
    assert p.partials % 256 == 0
    assert 0 < p.partials - workspace.address < 256
    ctas = gemm.grid[0]
    assert p.partials + ctas * variant.workspace_per_cta <= workspace.address + workspace.shape[0]
    ((chunk, size),) = fake.kept.items()
    assert chunk <= p.counters
    assert p.counters + 4 * ctas * variant.mma_warps <= chunk + size
    assert ("memset", chunk, 0, size) in fake.log
    assert [entry[0] for entry in fake.log].index("synchronize") < len(fake.log) - 1, "zero before the launch"
    assert fake.allocated == {}


def test_workspace_size_is_enough_for_split_k_on_every_variant(fake):
    for gpu in (0, 1):
        size = sm12x.workspace_size(1, device=gpu)
        for variant in manifest.default().gemms("fp8_packed"):
            assert fake.gpus[gpu].sm_count * variant.workspace_per_cta <= size
            assert 4 * fake.gpus[gpu].sm_count * variant.mma_warps <= counters.block_bytes(
                sm12x.driver.get_device(gpu)
            )


def test_a_workspace_one_byte_too_small_is_refused_and_the_exact_one_taken(fake):
    sm12x.grouped_gemm(**operands(fake), variant=SPLIT)
    ((_, needed),) = fake.allocated.items()
    fake.launches.clear()
    small = fake.tensor((needed - 1,), "uint8")
    with pytest.raises(ValueError, match=f"workspace: expected at least {needed} bytes.*got {needed - 1}"):
        sm12x.grouped_gemm(**operands(fake, workspace=small), variant=SPLIT)
    assert fake.launches == []
    sm12x.grouped_gemm(**operands(fake, workspace=fake.tensor((needed,), "uint8")), variant=SPLIT)
    assert len(fake.launches) == 1


def test_whole_tiles_take_a_workspace_of_any_size(fake):
    sm12x.grouped_gemm(**operands(fake, workspace=fake.tensor((1,), "uint8")), variant=WHOLE)
    assert only_launch(fake).params.partials == 0


def test_without_a_workspace_split_k_gets_one_in_stream_order(fake):
    sm12x.grouped_gemm(**operands(fake), variant=SPLIT)
    ((address, _),) = fake.allocated.items()
    assert (only_launch(fake).params.partials, fake.freed) == (address, [address])
    kinds = [entry[0] for entry in fake.log if entry[0] in ("alloc", "launch", "free")]
    assert kinds == ["alloc", "launch", "free"]
    assert {entry[-1] for entry in fake.log if entry[0] in ("alloc", "launch", "free")} == {STREAM}


def test_a_workspace_that_overlaps_an_operand_is_refused_where_it_is_used(fake):
    args = operands(fake)
    args["workspace"] = fake.tensor((sm12x.workspace_size(E),), "uint8")
    args["workspace"].address = args["a"].address - 256
    with pytest.raises(ValueError, match=r"workspace: expected memory of its own.*overlaps a"):
        sm12x.grouped_gemm(**args, variant=SPLIT)
    assert fake.launches == []


def test_a_problem_without_k_to_split_runs_split_all_the_same(fake):
    t = fake.tensor
    args = operands(fake, a=t((M, 16), "float8_e4m3fn"), b=t((E, N, 16), "float8_e4m3fn"))
    sm12x.grouped_gemm(**args, variant=SPLIT)
    assert only_launch(fake).params.least_units == 1


# SM12X_CHECK=1: offsets and counts are read back before anything is launched.


@pytest.mark.parametrize("mode", [WHOLE, SPLIT])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (range(0, 4 * E + 1, 4), None),
        ([0] * (E + 1), None),
        ([0, 5, 4] + [6] * (E - 2), "some that decrease"),
        ([-1] + [6] * E, "some below 0 or above M"),
        ([0] * E + [M + 1], "some below 0 or above M"),
        ([3, -2] + [M + 9] * (E - 1), "some that decrease and some below 0 or above M"),
    ],
)
def test_check_refuses_bad_offsets_before_the_launch(fake, monkeypatch, mode, wide, values, words):
    monkeypatch.setattr(launch, "CHECK", True)
    args = operands(fake)
    args["offsets"] = fake.tensor((E + 1,), "int64" if wide else "int32")
    fake.content[args["offsets"].address] = struct.pack(f"<{E + 1}{'q' if wide else 'i'}", *values)
    if words is None:
        sm12x.grouped_gemm(**args, variant=mode)
        assert len(fake.launches) == 1
        return
    with pytest.raises(ValueError, match=f"^offsets: expected values from 0 to M.*got {words} .*not written"):
        sm12x.grouped_gemm(**args, variant=mode)
    assert fake.launches == []
    assert sorted(fake.allocated) == sorted(fake.freed)


@pytest.mark.parametrize(("values", "good"), [([0, MAX_M], True), ([MAX_M + 1], False), ([3, -1], False)])
def test_check_refuses_bad_counts_before_the_launch(fake, monkeypatch, values, good):
    monkeypatch.setattr(launch, "CHECK", True)
    args = masked(fake)
    fake.content[args["rows"].address] = struct.pack(f"<{E}i", *values, *[1] * (E - len(values)))
    if good:
        sm12x.grouped_gemm(**args)
    else:
        with pytest.raises(ValueError, match=f"^rows: expected values from 0 to max_m = {MAX_M}, got"):
            sm12x.grouped_gemm(**args)
    assert len(fake.launches) == good


def test_check_is_refused_while_capturing(fake, monkeypatch):
    monkeypatch.setattr(launch, "CHECK", True)
    fake.capturing = True
    with pytest.raises(ValueError, match=r"^stream: SM12X_CHECK=1 .* captured"):
        sm12x.grouped_gemm(**operands(fake), variant=WHOLE)
    assert fake.launches == []


# Which kernel, and what goes wrong.


def test_a_mode_is_forced_behind_the_key(fake):
    for mode, splits in ((WHOLE, False), (SPLIT, True)):
        sm12x.grouped_gemm(**operands(fake), variant=mode)
        assert (fake.launches[-1].params.least_units > 0) == splits


def test_what_the_host_knows_of_a_call_reaches_select(fake, monkeypatch):
    asked = []
    select = launch.select

    def watched(problem, variants, sms):
        asked.append((problem, sms))
        return select(problem, variants, sms)

    monkeypatch.setattr(launch, "select", watched)
    weight = fake.tensor((E, MAX_M), "float32")
    sm12x.grouped_gemm(**masked(fake, expected_m=4, row_weight=weight))
    sm12x.grouped_gemm(**gathered(fake))
    (counted, sms), (indexed, _) = asked
    assert sms == fake.gpus[0].sm_count
    assert (counted.kind, counted.rows, counted.max_rows, counted.expected_rows) == ("masked", 0, MAX_M, 4)
    assert (counted.gathers, counted.weighted) == (False, True)
    assert (indexed.kind, indexed.rows, indexed.max_rows, indexed.expected_rows) == ("packed", M, 0, 0)
    assert (indexed.gathers, indexed.weighted) == (True, False)
    for problem in (counted, indexed):
        assert (problem.groups, problem.n, problem.k, problem.arch) == (E, N, K, "sm_120a")


def test_a_key_alone_takes_the_better_mode(fake):
    sm12x.grouped_gemm(**operands(fake), variant=KEY)
    assert only_launch(fake).symbol == f"sm12x_{KEY}"


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (f"{KEY}:", "expected split or whole behind the key"),
        (f"{KEY}:both", "expected split or whole behind the key"),
        ("fp8_ptr_array_128x16x128_swap_bf16:split", "expected a kernel that splits K"),
        (f"{KEY}_bf16", "there is none of that name"),
        ("", "there is none of that name"),
    ],
)
def test_a_variant_that_does_not_exist_says_so(fake, variant, words):
    with pytest.raises(ValueError, match=f"^variant: .*{words}"):
        sm12x.grouped_gemm(**operands(fake), variant=variant)
    assert nothing_happened(fake)


def test_whole_is_what_a_ptr_array_kernel_does(fake):
    sm12x.grouped_gemm(**operands(fake), variant="fp8_ptr_array_128x16x128_swap_bf16:whole")
    assert fake.launches[0].symbol == PREPARE


@pytest.mark.parametrize("what", ["masked", "row_index", "row_weight", "float32"])
def test_the_other_family_says_why_it_cannot(fake, what):
    args = {
        "masked": lambda: masked(fake),
        "row_index": lambda: gathered(fake),
        "row_weight": lambda: operands(fake, row_weight=fake.tensor((M,), "float32")),
        "float32": lambda: operands(fake, out=fake.tensor((M, N), "float32"), out_dtype="float32"),
    }[what]()
    with pytest.raises(ValueError, match=rf"^variant: .*it .*{what}"):
        sm12x.grouped_gemm(**args, variant="fp8_ptr_array_128x16x128_swap_bf16")
    assert nothing_happened(fake)
    sm12x.grouped_gemm(**args)
    assert only_launch(fake).symbol.startswith("sm12x_fp8_packed_")


def test_a_list_call_is_not_for_this_family(fake):
    lists = {"a": [fake.tensor((3, K), "float8_e4m3fn")], "b": [fake.tensor((N, K), "float8_e4m3fn")]}
    with pytest.raises(ValueError, match=r"^variant: .*not list ones"):
        sm12x.grouped_gemm(**lists, variant=KEY)
    sm12x.grouped_gemm(**lists)
    assert fake.launches[-1].symbol.startswith("sm12x_fp8_ptr_array_")


@pytest.mark.parametrize(
    "call", ["cuLaunchKernelEx", "cuTensorMapReplaceAddress", "cuTensorMapEncodeTiled", "cuCtxGetCurrent"]
)
def test_every_status_of_a_call_is_checked(fake, call):
    fake.fail[call] = 719
    with pytest.raises(sm12x.CudaError, match=f"{call} failed.*719") as caught:
        sm12x.grouped_gemm(**operands(fake), variant=WHOLE)
    assert fake.launches == []
    if call.startswith("cuLaunch"):
        assert KEY in str(caught.value)
        assert f"packed M={M} E={E} N={N} K={K}" in str(caught.value)
    fake.fail.clear()
    sm12x.grouped_gemm(**operands(fake), variant=WHOLE)
    p = only_launch(fake).params
    assert address_of(p.map_a) == p.a, "a map that could not be written is not taken to be"


def test_threads_do_not_share_parameters(fake):
    """A call that begins while another of the same plan is in the driver has parameters of its own."""
    sm12x.grouped_gemm(**operands(fake), variant=WHOLE)
    (plan,) = module._plans.values()
    taken = plan.launches.slots.pop()
    args = operands(fake)
    sm12x.grouped_gemm(**args, variant=WHOLE)
    assert fake.launches[-1].params.a == args["a"].address
    assert plan.launches.slots[-1] is not taken
