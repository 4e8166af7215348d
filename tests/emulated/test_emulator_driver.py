"""The emulated driver and the mirrors of host arrays: host arrays take the way of a GPU's.

Kernels are stand-ins in NumPy, but for the tests at the end, which run the shipped ones.
"""

from __future__ import annotations

import ctypes
import lzma
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import sm12x
from emulated import stand_in
from sm12x import counters, emulator, manifest, reference
from sm12x import driver as runtime
from sm12x.device_memory import DeviceArray
from sm12x.emulator import devices, driver, shipped, tensor_map
from sm12x.errors import CubinError, CudaError
from sm12x.ops import emulated, launch

FP8 = ml_dtypes.float8_e4m3fn


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(emulated, "BACKEND", None)
    made = stand_in.install(monkeypatch)
    yield made
    stand_in.reset(monkeypatch)


@pytest.fixture
def fresh(monkeypatch):
    """An emulated driver that nobody used, with the emulator's own kernels."""
    monkeypatch.setattr(emulated, "BACKEND", None)
    stand_in.reset(monkeypatch)
    yield driver._emulator
    stand_in.reset(monkeypatch)


SMALL = "fp8_ptr_array_128x16x128_swap_bf16"
ONE_LAUNCH = "fp8_packed_128x16x128_swap"


def in_use():
    """Bytes of emulated memory that calls have not given back; counters of split-K are kept."""
    kept = 0
    for ordinal, device in runtime._devices.items():
        if ordinal >= runtime.EMULATED:
            blocks = len(device.counters) + len(device.spare_counters)
            kept += blocks * counters.block_bytes(device)
    return driver.memory().used - kept


def fp8(rng, *shape):
    return rng.standard_normal(shape).astype(FP8)


def packed(rng, counts=(3, 0, 7), n=16, k=32, **more):
    e, m = len(counts), sum(counts)
    return {
        "a": fp8(rng, m, k),
        "b": fp8(rng, e, n, k),
        "offsets": np.cumsum([0, *counts]).astype(np.int32),
        **more,
    }


def masked(rng, counts=(3, 0, 4), most=4, n=16, k=32, **more):
    e = len(counts)
    return {
        "a": fp8(rng, e, most, k),
        "b": fp8(rng, e, n, k),
        "rows": np.array(counts, np.int32),
        **more,
    }


def run(arguments, **options):
    """The call in the emulator; the operands are left alone, which every test checks."""
    held = {name: np.array(value, copy=True) for name, value in arguments.items() if name in ("a", "b")}
    result = sm12x.grouped_gemm(**arguments, **options, backend="emulator")
    for name, before in held.items():
        np.testing.assert_array_equal(arguments[name].view(np.uint8), before.view(np.uint8))
    return result


def close(out, arguments, **more):
    expected = sm12x.grouped_gemm(**{**arguments, "out": None, "variant": None, "workspace": None}, **more)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("wide", [np.int32, np.int64])
@pytest.mark.parametrize("a_scale", [None, 0.5, "one", "token", "expert"])
@pytest.mark.parametrize("b_scale", [2.0, "one", "expert", "channel"])
def test_a_packed_call_computes_what_the_reference_does(kernels, rng, wide, a_scale, b_scale):
    shapes = {
        **{("a", "one"): (1,), ("a", "token"): (10, 1), ("a", "expert"): (3, 1, 1)},
        **{("b", "one"): (1,), ("b", "expert"): (3,), ("b", "channel"): (3, 16)},
    }

    def scale(side, kind):
        if not isinstance(kind, str):
            return kind
        return rng.uniform(0.5, 2, shapes[side, kind]).astype(np.float32)

    arguments = packed(rng, a_scale=scale("a", a_scale), b_scale=scale("b", b_scale))
    arguments["offsets"] = arguments["offsets"].astype(wide)
    out = run(arguments)
    assert out.dtype == ml_dtypes.bfloat16
    close(out, arguments)


@pytest.mark.parametrize("wide", [np.int32, np.int64])
@pytest.mark.parametrize("a_scale", [0.5, "token", "expert"])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mode", ["whole", "split"])
def test_gathered_and_masked_calls_compute_what_the_reference_does(
    kernels, rng, wide, a_scale, out_dtype, mode
):
    def weights(*shape):
        return rng.uniform(0.5, 2, shape).astype(np.float32)

    options = {"variant": f"{ONE_LAUNCH}:{mode}", "out_dtype": out_dtype}
    bias = rng.standard_normal((3, 16)).astype(np.float32)
    tokens = 6
    gathered = packed(rng, bias=bias, row_weight=weights(10, 1))
    gathered["a"] = fp8(rng, tokens, 32)
    gathered["row_index"] = rng.integers(-1, tokens + 1, 10).astype(wide)  # some name no token
    gathered["a_scale"] = {"token": weights(tokens, 1), "expert": weights(3, 1, 1)}.get(a_scale, a_scale)
    counts = masked(rng, bias=bias, row_weight=weights(3, 4), expected_m=2)
    counts["rows"] = counts["rows"].astype(wide)
    counts["a_scale"] = {"token": weights(3, 4), "expert": weights(3, 1, 1)}.get(a_scale, a_scale)
    for arguments, shape in ((gathered, (10, 16)), (counts, (3, 4, 16))):
        out = run(arguments, **options)
        assert (out.dtype.name, out.shape) == (out_dtype, shape)
        close(out, arguments, out_dtype=out_dtype)


def test_rows_beyond_the_count_keep_what_they_held(kernels, rng):
    arguments = masked(rng, (2, 0, 4))
    wide = np.full((4, 3, 24), 7, ml_dtypes.bfloat16)
    arguments["out"] = wide.transpose(1, 0, 2)[:, :, :16]
    assert run(arguments) is arguments["out"]
    expected = sm12x.grouped_gemm(**{**arguments, "out": None})
    for e, count in enumerate(arguments["rows"]):
        np.testing.assert_allclose(
            np.float32(arguments["out"][e, :count]), np.float32(expected[e, :count]), rtol=2e-2, atol=2e-2
        )
        assert (arguments["out"][e, count:] == 7).all()
    assert (wide[:, :, 16:] == 7).all()


def test_the_same_kernel_is_chosen_as_on_the_device_itself(kernels, rng):
    arguments = packed(rng, (40, 0, 90, 3), n=256, k=64)
    for name, arch, sms in (
        ("rtx5090", "sm_120a", 170),
        ("rtxpro6000", "sm_120a", 188),
        ("gb10", "sm_121a", 48),
    ):
        with emulator.use(device=name) as session:
            close(run(arguments), arguments)
        problem = launch.Problem("packed", 4, *["float8_e4m3fn"] * 2, "bfloat16", arch, 133, 256, 64)
        choice = launch.select(problem, manifest.default().gemms(), sms)[0]
        best = choice.variant
        gemm = session.launches[-1]
        assert len(session.launches) == (1 if best.family == "fp8_packed" else 2)
        assert (gemm.variant, gemm.arch, gemm.block, gemm.shared_memory) == (
            best.key,
            arch,
            (best.threads, 1, 1),
            best.shared_memory,
        )
        device = emulated_device(name)
        assert max(gemm.grid) == launch.grid_size(problem, choice, device)
        assert device.name == f"{devices.GPUS[name].name} (emulated)"
    assert any(".target sm_121a" in text for text in kernels.texts)


def emulated_device(name="rtx5090", **options):
    with emulator.use(device=name, **options):
        return driver.open_device()


def test_fewer_sms_make_a_smaller_grid(kernels, rng):
    arguments = packed(rng, (300, 300), n=512, k=16)
    grids = {}
    for sms in (None, 7, 1):
        with emulator.use(sms=sms) as session:
            close(run(arguments), arguments)
        grids[sms] = max(session.launches[-1].grid)
    assert grids[7] == 7
    assert grids[1] == 1
    assert grids[None] > 7


def test_a_forced_variant_runs_and_a_wrong_one_is_refused(kernels, rng):
    arguments = packed(rng)
    for variant in manifest.default().gemms():
        for kind in variant.outs:
            for mode in ("", ":whole", ":split") if variant.family == "fp8_packed" else ("",):
                with emulator.use() as session:
                    out = run(arguments, variant=variant.key + mode, out_dtype=kind)
                assert session.launches[-1].variant == variant.key
                close(out, arguments, out_dtype=kind)
    with pytest.raises(ValueError, match="variant: expected one of"):
        run(arguments, variant="fp8_ptr_array_nothing")


@pytest.mark.parametrize(("key", "count"), [(SMALL, 2), (ONE_LAUNCH, 1)])
def test_the_seed_of_the_session_reaches_every_launch(kernels, rng, key, count):
    arguments = packed(rng, variant=key)
    with emulator.use(seed=11):
        run(arguments)
        with emulator.use(seed=12):
            run(arguments)
        run(arguments)
    run(arguments)
    assert kernels.seeds == [seed for seed in (11, 12, 11, 0) for _ in range(count)]


@pytest.mark.parametrize(("key", "count"), [(SMALL, 2), (ONE_LAUNCH, 1)])
def test_the_options_of_the_session_reach_loads_and_launches(kernels, rng, key, count):
    arguments = packed(rng, variant=key)
    shown = []
    with emulator.use(resident=2, truncate_bits=22) as session:
        session.progress = lambda variant, segments: shown.append((variant, segments))
        run(arguments)
        assert kernels.residents == [2] * count
        assert kernels.truncated == [22] * count
        assert shown == [(each.variant, 1000) for each in session.launches]
    run(arguments)
    assert kernels.residents[count:] == [None] * count
    assert kernels.truncated[count:] == [None] * count, "the kernels of another arithmetic are others"


def test_strided_operands_lie_as_they_lay(kernels, rng):
    # Columns of one buffer: rows of a, b and out lie in each other's gaps.
    buffer = np.full((10, 256), 0x7B, np.uint8)
    wide = np.full((3, 16, 48), 0x7B, np.uint8)
    arguments = packed(rng)
    a, b = buffer[:, 16:48].view(FP8), wide[:, :, 16:].view(FP8)
    a[...], b[...] = arguments["a"], arguments["b"]
    out = buffer[:, 64:96].view(ml_dtypes.bfloat16)
    arguments.update(a=a, b=b, out=out)
    assert run(arguments) is out
    close(out, arguments)
    untouched = np.ones(256, bool)
    untouched[16:48] = untouched[64:96] = False
    assert (buffer[:, untouched] == 0x7B).all()


def test_rows_of_no_group_keep_what_they_held(kernels, rng):
    arguments = packed(rng, (3, 4))
    arguments["a"] = fp8(rng, 12, 32)
    arguments["offsets"] = np.array([2, 5, 9], np.int32)
    arguments["out"] = np.full((12, 16), 7, ml_dtypes.bfloat16)
    run(arguments)
    assert (arguments["out"][[0, 1, 9, 10, 11]] == 7).all()
    close(arguments["out"][2:9], {**arguments, "a": arguments["a"][2:9], "offsets": arguments["offsets"] - 2})
    new = run({**arguments, "out": None})
    assert not np.asarray(new[[0, 1, 9, 10, 11]], np.float32).any()


@pytest.mark.parametrize("bias", [False, True])
def test_a_list_call_computes_what_the_reference_does(kernels, rng, bias):
    shapes = [(5, 8, 16), (0, 24, 32), (3, 40, 48), *[(1, 8, 16)] * 400]
    scale = np.float32([0.25])
    arguments = {
        "a": [fp8(rng, m, k) for m, _, k in shapes],
        "b": [fp8(rng, n, k) for _, n, k in shapes],
        "a_scale": [rng.uniform(0.5, 2, m).astype(np.float32) if m > 1 else None for m, *_ in shapes],
        "b_scale": scale,
        "bias": [rng.standard_normal(n).astype(np.float32) for _, n, _ in shapes] if bias else None,
    }
    with emulator.use() as session:
        outs = sm12x.grouped_gemm(**arguments, backend="emulator")
    assert len(session.launches) == 3, "two chunks of records and the GEMM"
    for out, expected in zip(outs, sm12x.grouped_gemm(**arguments), strict=True):
        np.testing.assert_allclose(np.float32(out), np.float32(expected), rtol=2e-2, atol=2e-2)
    given = tuple(np.zeros_like(out) for out in outs)
    returned = sm12x.grouped_gemm(**arguments, out=given, backend="emulator")
    assert [id(each) for each in returned] == [id(each) for each in given]
    np.testing.assert_array_equal(np.float32(given[2]), np.float32(outs[2]))
    assert sm12x.grouped_gemm([], [], backend="emulator") == []


def test_a_workspace_of_the_caller_is_used(kernels, rng):
    arguments = packed(rng)
    size = sm12x.workspace_size(3, backend="emulator")
    workspace = np.full(size + 256, 0xAB, np.uint8)
    for variant in (SMALL, f"{ONE_LAUNCH}:split", f"{ONE_LAUNCH}:whole"):
        out = run({**arguments, "workspace": workspace, "variant": variant})
        close(out, arguments)
        assert in_use() == 0
        if variant.endswith("whole"):
            close(run({**arguments, "workspace": workspace[:64], "variant": variant}), arguments)
            continue
        with pytest.raises(ValueError, match="workspace: expected at least"):
            run({**arguments, "workspace": workspace[:64], "variant": variant})


def test_threads_call_at_once(kernels, rng):
    problems = [packed(rng, (3, 0, i)) for i in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        for arguments, out in zip(problems, pool.map(run, problems), strict=True):
            close(out, arguments)
    assert in_use() == 0


def test_an_empty_call_launches_nothing(kernels, rng):
    with emulator.use() as session:
        assert run(packed(rng, (0, 0))).shape == (0, 16)
    assert session.launches == []


def test_memory_is_given_back_whatever_happens(kernels, rng):
    arguments = packed(rng)
    run(arguments)
    assert in_use() == 0
    kernels.rogue = lambda memory, groups: memory.read(0x10, 4)
    with pytest.raises(Exception, match="null pointer|no allocation"):
        run(arguments)
    assert in_use() == 0
    with pytest.raises(ValueError, match="b: expected"):
        run({**arguments, "b": fp8(rng, 3, 16, 64)})
    assert in_use() == 0


@pytest.mark.parametrize(
    ("rogue", "told"),
    [
        (
            lambda memory, g: memory.write(g.a, b"\x01"),
            "1 bytes that are no part of any output.*0 bytes.*of a",
        ),
        (lambda memory, g: memory.write(g.b + 5, b"\x01\x02"), "2 bytes.*5 bytes behind the beginning of b"),
        (lambda memory, g: memory.write(g.d + 40, b"\x01\x01"), "2 bytes.*40 bytes.*of out"),
    ],
)
def test_writes_beside_the_output_are_errors_and_leave_it_alone(kernels, rng, rogue, told):
    arguments = packed(rng, (4,))
    arguments["a"][0, 0] = 0
    arguments["b"][0, 0, 5:7] = 0
    whole = np.full((4, 40), 9, ml_dtypes.bfloat16)
    arguments["out"] = whole[:, :16]  # 32 bytes of each 80 are its own
    kernels.rogue = lambda memory, groups: rogue(memory, groups[0])
    with pytest.raises(emulator.EmulatorError, match=told):
        sm12x.grouped_gemm(**arguments, backend="emulator")
    assert (whole == 9).all()


def test_bytes_that_the_caller_did_not_give_are_not_written_yet(kernels, rng):
    seen = {}

    def look(memory, groups):
        g = groups[0]
        seen["a"] = memory.written(g.a, 2 * g.stride_a).reshape(2, -1)
        seen["out"] = memory.written(g.d, g.stride_d * 2)

    arguments = packed(rng, (4,))
    wide = np.zeros((4, 48), np.uint8)
    a = wide[:, :32].view(FP8)
    a[...] = arguments["a"]
    # Rows of the second group: the stand-in writes those of the first before it looks.
    arguments.update(a=a, out=np.zeros((6, 24), ml_dtypes.bfloat16)[2:, :16])
    kernels.rogue = look
    run(arguments)
    assert seen["a"][:, :32].all()
    assert not seen["a"][:, 32:].any()
    assert not seen["out"][32:].any()


def test_an_address_off_a_multiple_of_16_is_refused_as_on_a_gpu(kernels, rng):
    raw = np.zeros(10 * 32 + 8, np.uint8)
    off = raw[8 - raw.ctypes.data % 16 :][: 10 * 32].reshape(10, 32).view(FP8)
    assert off.ctypes.data % 16 == 8
    with pytest.raises(ValueError, match="a: expected an address that is a multiple of 16 bytes"):
        run({**packed(rng), "a": off})


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"a": "text"}, TypeError, "a: expected an array"),
        ({"b": np.zeros((3, 16, 32), np.float32)}, TypeError, "b: expected"),
        ({"offsets": np.zeros(3, np.int32)}, ValueError, "offsets: expected"),
        ({"offsets": np.zeros(4, np.float32)}, TypeError, "offsets: expected"),
        ({"a_scale": np.zeros(10, np.float64)}, TypeError, "a_scale: expected"),
        ({"out": np.zeros((10, 16), np.float32)}, TypeError, "out: expected"),
        ({"out_dtype": "float64"}, ValueError, "out_dtype: expected one of"),
        ({"a": np.zeros((10, 32), ml_dtypes.float8_e5m2)}, ValueError, "no kernel for"),
        ({"row_index": np.zeros((10, 1), np.int32)}, ValueError, "row_index: expected"),
        ({"row_weight": np.zeros(9, np.float32)}, ValueError, "row_weight: expected"),
        ({"rows": np.zeros(3, np.int32)}, ValueError, "offsets: expected None where rows is given"),
        ({"expected_m": 4}, ValueError, "expected_m: expected None"),
        ({"stream": 5}, ValueError, "stream: expected None with the emulator"),
        ({"a": DeviceArray(4096, (10, 32), "float8_e4m3fn", 0, None)}, ValueError, "a: expected host memory"),
        ({"bias": DeviceArray(4096, (3, 16), "float32", 1, None)}, ValueError, "bias: expected host memory"),
        ({"variant": 3}, TypeError, "variant: expected"),
    ],
)
def test_bad_arguments_are_named(kernels, rng, changes, error, told):
    with pytest.raises(error, match=told):
        sm12x.grouped_gemm(**{**packed(rng), **changes}, backend="emulator")
    assert in_use() == 0


def test_an_output_that_overlaps_an_input_is_refused(kernels, rng):
    arguments = packed(rng, (4,))
    shared = np.zeros((8, 64), np.uint8)
    arguments["a"] = shared[:4, :32].view(FP8)
    arguments["out"] = shared[2:6, :32].view(ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match="out: expected memory of its own, got an array that overlaps a"):
        sm12x.grouped_gemm(**arguments, backend="emulator")


def test_a_read_only_output_is_refused(kernels, rng):
    out = np.zeros((10, 16), ml_dtypes.bfloat16)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected an array that can be written"):
        run({**packed(rng), "out": out})


def test_offsets_are_checked_where_that_is_asked_for(kernels, rng, monkeypatch):
    monkeypatch.setattr(launch, "CHECK", True)
    told = "offsets: expected values from 0 to M that never decrease"
    run(packed(rng, variant=SMALL))
    kernels.status = 1
    with pytest.raises(ValueError, match=told):
        run(packed(rng, variant=SMALL))
    arguments = packed(rng, variant=ONE_LAUNCH)
    run(arguments)
    arguments["offsets"][1:3] = 5, 4
    with pytest.raises(ValueError, match=told):
        run(arguments)
    with pytest.raises(ValueError, match="rows: expected values from 0 to max_m = 4, got 1 to 5"):
        run(masked(rng, (1, 5, 2)))


def test_the_environment_chooses_the_backend(kernels, rng, monkeypatch):
    arguments = packed(rng)
    monkeypatch.setattr(emulated, "BACKEND", "emulator")
    with emulator.use() as session:
        close(sm12x.grouped_gemm(**arguments), {**arguments, "backend": "auto"})
        (gemm,) = (each for each in session.launches if "prepare" not in each.variant)
        assert gemm.grid, "one of the two calls ran in the emulator"
    assert sm12x.workspace_size(3) == sm12x.workspace_size(3, backend="emulator")
    monkeypatch.setattr(emulated, "BACKEND", "gpu")
    with pytest.raises(ValueError, match="SM12X_BACKEND: expected one of auto, emulator, got 'gpu'"):
        sm12x.grouped_gemm(**arguments)
    monkeypatch.setattr(emulated, "BACKEND", None)
    with pytest.raises(ValueError, match="backend: expected one of auto, emulator, got 'cpu'"):
        sm12x.grouped_gemm(**arguments, backend="cpu")


def test_the_environment_chooses_the_device(kernels, rng, monkeypatch):
    for name, value in (("DEVICE", "gb10"), ("SMS", "3"), ("SEED", "9"), ("RACES", "0")):
        monkeypatch.setenv(f"SM12X_EMULATOR_{name}", value)
    assert emulator.session.options() == emulator.Options("gb10", 3, 9, races=False)
    device = driver.open_device()
    assert (device.arch, device.sm_count) == ("sm_121a", 3)
    run(packed(rng))
    assert set(kernels.seeds) == {9}
    for name, value, told in (
        ("SMS", "many", "SM12X_EMULATOR_SMS: expected an integer, got 'many'"),
        ("SMS", "49", "SM12X_EMULATOR_SMS: expected 1 to 48 for gb10, got 49"),
        ("DEVICE", "rtx4090", "SM12X_EMULATOR_DEVICE: expected one of rtx5090"),
        ("RACES", "2", "SM12X_EMULATOR_RACES: expected 0 or 1, got 2"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(f"SM12X_EMULATOR_{name}", value)
            with pytest.raises(ValueError, match=told):
                sm12x.grouped_gemm(**packed(rng), backend="emulator")


def test_options_are_checked():
    with pytest.raises(TypeError, match="speed: expected an option"), emulator.use(speed=1):
        pass
    with pytest.raises(ValueError, match="sms: expected 1 to 170 for rtx5090, got 0"), emulator.use(sms=0):
        pass
    with pytest.raises(ValueError, match="seed: expected at least 0"), emulator.use(seed=-1):
        pass
    with pytest.raises(ValueError, match="resident: expected at least 1"), emulator.use(resident=0):
        pass
    with pytest.raises(ValueError, match="truncate_bits: expected 1 to 24"), emulator.use(truncate_bits=25):
        pass


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        *(
            (name, value, "an integer")
            for name in ("sms", "resident", "truncate_bits")
            for value in ("3", 2.5)
        ),
        *(("seed", value, "an integer") for value in ("3", 1.0, None)),
        *(("device", value, "one of rtx5090") for value in (5, None, ["gb10"])),
    ],
)
def test_options_of_a_wrong_type_are_named(option, value, told):
    wrong = re.escape(f"{option}: expected {told}") + ".*" + re.escape(f"got {value!r}")
    with pytest.raises(TypeError, match=wrong), emulator.use(**{option: value}):
        pass


@pytest.mark.parametrize("option", ["races", "counters"])
@pytest.mark.parametrize("value", ["no", None, 2, 1.0])
def test_switches_are_0_or_1(option, value):
    with pytest.raises(ValueError, match=f"{option}: expected 0 or 1, got"), emulator.use(**{option: value}):
        pass


def test_numpy_integers_are_options(kernels, rng):
    with emulator.use(seed=np.int64(9), sms=np.int32(2), resident=np.uint8(1)) as session:
        run(packed(rng))
    assert set(kernels.seeds) == {9}
    assert type(session.options.seed) is int  # the scheduler's generator takes no other


def torch_cpu(array):
    torch = pytest.importorskip("torch")
    kinds = {FP8: torch.float8_e4m3fn, ml_dtypes.bfloat16: torch.bfloat16}
    kind = kinds.get(array.dtype.type)
    if kind is None:
        return torch.from_numpy(array.copy())
    plain = np.uint8 if array.itemsize == 1 else np.int16
    return torch.from_numpy(array.view(plain).copy()).view(kind)


def test_torch_tensors_in_host_memory_run(kernels, rng):
    torch = pytest.importorskip("torch")
    arguments = packed(rng, b_scale=rng.uniform(0.5, 2, (3, 16)).astype(np.float32))
    tensors = {name: torch_cpu(value) for name, value in arguments.items()}
    out = sm12x.grouped_gemm(**tensors, backend="emulator")
    assert (type(out), out.dtype, tuple(out.shape)) == (torch.Tensor, torch.bfloat16, (10, 16))
    close(out.float().numpy(), arguments)
    given = torch.zeros(10, 16, dtype=torch.bfloat16)
    assert sm12x.grouped_gemm(**tensors, out=given, backend="emulator") is given
    assert torch.equal(given, out)


def test_jax_arrays_in_host_memory_run(kernels, rng):
    jax = pytest.importorskip("jax")
    arguments = packed(rng)
    out = sm12x.grouped_gemm(
        **{name: jax.numpy.asarray(value) for name, value in arguments.items()}, backend="emulator"
    )
    assert isinstance(out, jax.Array)
    close(np.asarray(out), arguments)


# The driver's own functions, by the runtime's `Driver`.


def test_what_the_driver_refuses_is_a_cuda_error_with_its_name(fresh):
    device = emulated_device()
    d = device.driver
    with pytest.raises(CudaError, match="cuMemAlloc failed with CUDA_ERROR_INVALID_CONTEXT"):
        d.call("cuMemAlloc", 16)
    with runtime.current(device):
        for name, arguments, code in (
            ("cuMemAlloc", (0,), 1),
            ("cuMemAlloc", (1 << 50,), 2),
            ("cuMemFree", (0x1234,), 1),
            ("cuMemAllocAsync", (16, 0x5555), 400),
            ("cuStreamSynchronize", (0x5555,), 400),
            ("cuMemcpyHtoDAsync", (0x1234, id(None), 1, 0), 1),
            ("cuDeviceGet", (99,), 101),
            ("cuDeviceGetAttribute", ("CU_DEVICE_ATTRIBUTE_CLOCK_RATE", 0), 801),
            ("cuLibraryGetKernel", (5, b"x"), 400),
            ("cuKernelGetFunction", (5,), 400),
            ("cuCtxSetCurrent", (5,), 201),
        ):
            with pytest.raises(CudaError) as error:
                d.call(name, *arguments)
            assert (error.value.call, error.value.code) == (name, code)
        stream = d.call("cuStreamCreate", 1)
        pointer = d.call("cuMemAllocAsync", 64, stream)
        source, target = ctypes.create_string_buffer(bytes(range(64)), 64), ctypes.create_string_buffer(64)
        d.call("cuMemcpyHtoDAsync", pointer, ctypes.addressof(source), 64, stream)
        d.call("cuMemsetD8Async", pointer + 8, 0xEE, 8, stream)
        d.call("cuMemcpyDtoHAsync", ctypes.addressof(target), pointer, 64, stream)
        assert target.raw == bytes(range(8)) + b"\xee" * 8 + bytes(range(16, 64))
        d.call("cuMemFreeAsync", pointer, stream)
        with pytest.raises(CudaError, match="cuMemcpyDtoHAsync failed with CUDA_ERROR_INVALID_VALUE"):
            d.call("cuMemcpyDtoHAsync", ctypes.addressof(target), pointer, 64, stream)


def test_a_cubin_that_is_not_ours_or_not_the_devices_is_refused(fresh):
    blackwell, spark = emulated_device("rtx5090"), emulated_device("gb10")
    variant = manifest.default().variants["fp8_ptr_array_prepare_list"]
    image = manifest.read_cubin(manifest.default(), variant, "sm_121a", "cu13")
    arguments = ([], [], 0, [], [], 0)
    with runtime.current(blackwell):
        with pytest.raises(CudaError, match="CUDA_ERROR_NO_BINARY_FOR_GPU"):
            blackwell.driver.call("cuLibraryLoadData", image, *arguments)
        with pytest.raises(CubinError, match="this is none of them"):
            blackwell.driver.call("cuLibraryLoadData", image + b"\0", *arguments)
    with runtime.current(spark):
        library = spark.driver.call("cuLibraryLoadData", image, *arguments)
        with pytest.raises(CudaError, match="CUDA_ERROR_NOT_FOUND"):
            spark.driver.call("cuLibraryGetKernel", library, b"nothing")


def test_both_majors_cubins_lead_to_the_same_ptx():
    held = manifest.default()
    variant = held.variants["mma_probe_plain"]
    wheel = manifest.wheel_major()  # an installed wheel has the cubins of one
    majors = manifest.MAJORS if wheel is None else (wheel,)
    for arch in variant.targets:
        origins = [shipped.origin(manifest.read_cubin(held, variant, arch, major)) for major in majors]
        assert [(found.key, where) for found, where in origins] == [("mma_probe_plain", arch)] * len(majors)
        assert f".target {arch}" in shipped.read_ptx(variant, arch)


def test_altered_ptx_is_refused(monkeypatch, tmp_path):
    held = manifest.default()
    variant = held.variants["mma_probe_plain"]
    path = tmp_path / variant.targets["sm_120a"].ptx["path"]
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(manifest, "default", lambda: replace(held, root=tmp_path))
    with pytest.raises(CubinError, match="mma_probe_plain: .* cannot be read"):
        shipped.read_ptx(variant, "sm_120a")
    path.write_bytes(lzma.compress(b".version 8.8"))
    with pytest.raises(CubinError, match="is altered: expected sha256"):
        shipped.read_ptx(variant, "sm_120a")
    with pytest.raises(CubinError, match="no PTX for sm_70; there is sm_120a"):
        shipped.read_ptx(variant, "sm_70")


def test_tensor_maps_are_encoded_into_the_callers_memory(fresh):
    encode = emulated_device().driver.hot.cuTensorMapEncodeTiled
    storage = (ctypes.c_uint64 * 24)()
    start = ctypes.addressof(storage) + -ctypes.addressof(storage) % 64
    rest = (
        *(0, 2, ctypes.c_void_p(0x1000000000000), (ctypes.c_uint64 * 2)(128, 8), (ctypes.c_uint64 * 1)(128)),
        *((ctypes.c_uint32 * 2)(128, 8), (ctypes.c_uint32 * 2)(1, 1), 0, 3, 2, 0),
    )
    assert encode(ctypes.c_void_p(start), *rest) == 0
    assert tensor_map.decode(ctypes.string_at(start, 128)).box == (128, 8)
    assert encode(ctypes.c_void_p(start + 8), *rest) == 1, "64-byte alignment"
    assert encode(ctypes.c_void_p(0), *rest) == 1
    assert encode(ctypes.c_void_p(start), 99, *rest[1:]) == 1


def test_the_address_in_a_tensor_map_is_replaced_and_nothing_else(fresh):
    hot = emulated_device().driver.hot
    storage = (ctypes.c_uint64 * 24)()
    start = ctypes.addressof(storage) + -ctypes.addressof(storage) % 64
    content = tensor_map.encode_tiled(
        *(0, 3, 0x1000000000000, [128, 8, 2], [128, 1024], [128, 8, 1], [1, 1, 1], 0, 3, 2, 0)
    )
    ctypes.memmove(start, content, 128)
    replace_address = hot.cuTensorMapReplaceAddress
    assert replace_address(ctypes.c_void_p(start), ctypes.c_void_p(0x2000000000010)) == 0
    changed = tensor_map.decode(ctypes.string_at(start, 128))
    assert changed == replace(tensor_map.decode(content), address=0x2000000000010)
    assert replace_address(ctypes.c_void_p(start), ctypes.c_void_p(0x2000000000008)) == 1, "16-byte alignment"
    assert replace_address(ctypes.c_void_p(start + 8), ctypes.c_void_p(0x2000000000000)) == 1
    assert replace_address(ctypes.c_void_p(0), ctypes.c_void_p(0x2000000000000)) == 1
    assert tensor_map.decode(ctypes.string_at(start, 128)) == changed
    ctypes.memset(start, 0, 128)
    assert replace_address(ctypes.c_void_p(start), ctypes.c_void_p(0x2000000000000)) == 1, "never encoded"


def test_streams_end_and_zeroed_memory_is_zero(fresh):
    device = emulated_device()
    with runtime.current(device):
        address = runtime.allocate_zeroed(device, 300)
        assert runtime.read_bytes(device, address, 300, 0) == bytes(300)
        stream = device.driver.call("cuStreamCreate", 1)
        device.driver.call("cuStreamDestroy", stream)
        for gone in (stream, 0, 77):
            with pytest.raises(CudaError, match="cuStreamDestroy"):
                device.driver.call("cuStreamDestroy", gone)


def test_launches_that_cuda_refuses_are_refused(kernels, rng):
    device = emulated_device()
    variant = manifest.default().variants["fp8_ptr_array_128x128x128_coop_bf16"]
    function = runtime.get_function(device, variant)
    run_kernel = device.driver.hot.cuLaunchKernel
    block = launch.Block(bytes(448))

    def start(
        function=function, sizes=(1, 1, 1, 384, 1, 1), shared=variant.shared_memory, stream=0, extra=None
    ):
        arguments = *map(ctypes.c_uint, sizes), ctypes.c_uint(shared), ctypes.c_void_p(stream)
        return run_kernel(ctypes.c_void_p(function), *arguments, block.arguments, extra)

    assert start() == 201, "no context is current"
    with runtime.current(device):
        kernels.groups = []
        assert start() == 0
        assert start(function=77) == 400
        assert start(stream=77) == 400
        assert start(sizes=(0, 1, 1, 384, 1, 1)) == 1
        assert start(sizes=(1, 1, 1, 1056, 1, 1)) == 1
        assert start(shared=variant.shared_memory + 1) == 1, "more than the attribute allows"
        with pytest.raises(CudaError, match="cuFuncSetAttribute"):
            device.driver.call(
                "cuFuncSetAttribute", function, "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", 101377
            )


def test_devices_are_apart_from_those_of_cuda():
    assert all(gpu.capability in runtime.ARCHITECTURES for gpu in devices.GPUS.values())
    first = emulated_device("rtx5090")
    assert emulated_device("rtx5090") is first
    assert emulated_device("rtx5090", sms=4) is not first
    assert first.ordinal >= runtime.EMULATED
    with pytest.raises(ValueError, match="device: expected one of the"):
        runtime.get_device(runtime.EMULATED + 1000)


def isolated(code):
    path = [entry for entry in sys.path if entry]
    script = f"import sys\nsys.path[:] = {path!r}\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_emulator_needs_no_cuda_and_others_need_no_emulator():
    printed = isolated(
        """
        before = set(sys.modules)
        import numpy as np
        import sm12x
        a, b = np.zeros((4, 16), np.uint8), np.zeros((1, 8, 16), np.uint8)
        sm12x.grouped_gemm(a, b, offsets=np.array([0, 4], np.int32), dtype="float8_e4m3fn")
        print(any(name.startswith("sm12x.emulator") for name in sys.modules))
        print(sm12x.workspace_size(8, backend="emulator") > 0)
        heavy = {"cuda", "torch", "jax", "jaxlib", "cupy"}
        print(sorted(heavy & {name.partition(".")[0] for name in set(sys.modules) - before}))
        """
    )
    assert printed.split("\n") == ["False", "True", "[]"]


# The shipped kernels themselves; tests/emulated has more of them elsewhere.


def within_tolerance(out, arguments):
    operands = {name: arguments.get(name) for name in ("a", "b", "a_scale", "b_scale", "offsets", "bias")}
    ref, abs_sum = reference.grouped_gemm_float64(**operands)
    if arguments.get("offsets") is None:
        ks = [a.shape[1] for a in arguments["a"]]
        return reference.check_list(out, ref, abs_sum, ks)[1] <= 1
    return reference.check(out, ref, abs_sum, arguments["a"].shape[1])[1] <= 1


def test_the_shipped_kernels_compute_a_packed_call_whatever_the_seed(fresh, rng):
    arguments = packed(
        rng,
        (5, 0, 18),
        n=136,
        k=144,
        a_scale=rng.uniform(0.5, 2, (23, 1)).astype(np.float32),
        b_scale=rng.uniform(0.5, 2, (3, 136)).astype(np.float32),
        bias=rng.standard_normal((3, 136)).astype(np.float32),
    )
    wide = np.full((23, 160), 5, ml_dtypes.bfloat16)
    arguments["out"] = wide[:, 8:144]
    results = []
    for seed in rng.integers(0, 2**31, 2).tolist():
        arguments["out"][...] = 0
        with emulator.use(seed=seed, sms=3) as session:
            run(arguments, variant=SMALL)
        assert [each.variant for each in session.launches] == ["fp8_ptr_array_prepare_packed", SMALL]
        assert min(each.result.segments for each in session.launches) > 100, "no stand-in ran"
        assert within_tolerance(arguments["out"], arguments)
        results.append(wide.copy())
    assert (results[0].view(np.uint16) == results[1].view(np.uint16)).all(), "bit-identical from run to run"
    assert (wide[:, :8] == 5).all()
    assert (wide[:, 144:] == 5).all()


def test_the_shipped_kernels_compute_a_list_call(fresh, rng):
    shapes = [(3, 8, 16), (0, 16, 16), (17, 136, 144)]
    arguments = {
        "a": [fp8(rng, m, k) for m, _, k in shapes],
        "b": [fp8(rng, n, k) for _, n, k in shapes],
        "b_scale": [rng.uniform(0.5, 2, (n, 1)).astype(np.float32) for _, n, _ in shapes],
    }
    outs = sm12x.grouped_gemm(**arguments, variant=SMALL, backend="emulator")
    assert [out.shape for out in outs] == [(m, n) for m, n, _ in shapes]
    assert within_tolerance(outs, arguments)


def test_what_kernels_write_into_a_workspace_comes_back(fresh, rng):
    arguments = packed(rng, (3, 4))
    size = sm12x.workspace_size(2, backend="emulator")
    aligned = np.full(size + 256, 0xAB, np.uint8)
    workspace = aligned[-aligned.ctypes.data % 256 :][:size]
    run({**arguments, "workspace": workspace}, variant=SMALL)
    groups = workspace.tobytes()
    shapes = np.array([[16, 3, 32], [16, 4, 32]], np.int32).tobytes()  # (n, rows, k): operands are swapped
    assert shapes in groups
    assert (aligned[: workspace.ctypes.data - aligned.ctypes.data] == 0xAB).all()


def test_the_shipped_preparation_finds_bad_offsets(fresh, rng, monkeypatch):
    monkeypatch.setattr(launch, "CHECK", True)
    arguments = packed(rng, (3, 4), out=np.full((7, 16), 5, ml_dtypes.bfloat16))
    for offsets, told in (([0, 5, 3], "some that decrease"), ([0, 3, 8], "some below 0 or above M")):
        arguments["offsets"] = np.array(offsets, np.int32)
        with pytest.raises(ValueError, match=told):
            run(arguments, variant=SMALL)
    assert (arguments["out"] == 5).all()


@pytest.mark.parametrize("mode", ["whole", "split"])
@pytest.mark.parametrize("layout", ["packed", "gathered", "masked"])
def test_the_shipped_one_launch_kernels_compute_a_call_whatever_the_seed(fresh, rng, mode, layout):
    e, n, k = 3, 136, 144

    def weights(*shape):
        return rng.uniform(0.5, 2, shape).astype(np.float32)

    more = {"b_scale": weights(e, n), "bias": rng.standard_normal((e, n)).astype(np.float32)}
    if layout == "masked":
        arguments = masked(rng, (5, 0, 18), 20, n, k, a_scale=weights(e, 20), expected_m=8, **more)
        rows = (e, 20)
    else:
        arguments = packed(rng, (5, 0, 18), n, k, a_scale=weights(23, 1), **more)
        rows = (23,)
    if layout == "gathered":
        arguments["a"], arguments["a_scale"] = fp8(rng, 9, k), weights(9)
        arguments["row_index"] = rng.integers(-1, 10, 23).astype(np.int64)
    arguments["row_weight"] = weights(*rows)
    operands = {name: value for name, value in arguments.items() if name != "out"}
    ref, abs_sum = reference.grouped_gemm_float64(**operands)
    has_rows = ~np.isnan(ref)
    results = []
    for seed in rng.integers(0, 2**31, 2).tolist():
        arguments["out"] = np.full((*rows, n), 5, np.float32)
        with emulator.use(seed=seed, sms=3) as session:
            run(arguments, variant=f"{ONE_LAUNCH}:{mode}", out_dtype="float32")
        assert [each.variant for each in session.launches] == [ONE_LAUNCH]
        assert session.launches[0].result.segments > 100, "no stand-in ran"
        out = arguments["out"]
        assert (out[~has_rows] == 5).all(), "rows of no expert"
        assert reference.check(out[has_rows], ref[has_rows], abs_sum[has_rows], k)[1] <= 1
        results.append(out.copy())
    assert (results[0].view(np.uint32) == results[1].view(np.uint32)).all(), "bit-identical from run to run"


def test_a_shipped_one_launch_kernel_computes_a_call_for_one_cta(fresh, rng):
    """A single strip of features, and a device with one SM: the only CTA has all of it."""
    for counts, n, sms in (((1,), 8, 4), ((5, 0, 18), 136, 1)):
        arguments = packed(rng, counts, n, 48)
        ref, abs_sum = reference.grouped_gemm_float64(**arguments)
        for mode in ("whole", "split"):
            with emulator.use(sms=sms):
                out = run(arguments, variant=f"{ONE_LAUNCH}:{mode}")
            assert reference.check(out, ref, abs_sum, 48)[1] <= 1
