"""The floor: arithmetic on counters, and what ``python -m sm12x emulate`` says of it."""

from __future__ import annotations

import json

import pytest

from emulated import stand_in
from sm12x.cli import demo_gpu, main
from sm12x.emulator.counting.counters import Counters, Work, total
from sm12x.emulator.counting.floor import floor_of
from sm12x.emulator.counting.touched import Touched
from sm12x.emulator.devices import GPUS, find
from sm12x.ops import emulated

RTX5090, GB10 = find("rtx5090"), find("gb10")


def made(*, unique=0, macs=0, sure=0, busiest=None, form="block_scaled"):
    work = Work(issued=2 * sure, surely_issued=sure, multiply_adds={form: macs})
    return Counters(
        work=work,
        busiest_cta=busiest or Work(multiply_adds={form: 0}),
        unique_bytes={"loaded": unique, "stored": 0},
    )


def test_rates_are_those_of_design():
    assert (RTX5090.sm_count, RTX5090.dram_gbps, RTX5090.clock_ghz) == (170, 1792, 2.85)
    assert {form: rate.per_clock for form, rate in RTX5090.mma.items()} == {
        "plain": 1024,
        "block_scaled": 2048,
        "nvfp4": 4096,
    }
    for key, tflops in (("rtx5090", 992), ("rtxpro6000", 1000), ("gb10", 240)):
        gpu = GPUS[key]
        peak = gpu.mma["block_scaled"].per_clock * gpu.sm_count * gpu.clock_ghz / 1e3
        assert peak == pytest.approx(tflops, rel=0.01)
        assert (gpu.mma["block_scaled"].source == "assumed") == (key != "rtx5090")
        assert ("plain" in gpu.mma) == (key == "rtx5090")
        assert demo_gpu.KNOWN_BANDWIDTH[gpu.part] == (gpu.dram_gbps, gpu.dram_source)


def test_memory_binds():
    floor = floor_of(made(unique=1792_000_000, macs=170 * 1024 * 2850), RTX5090)
    assert floor.memory_us == pytest.approx(1000)
    assert floor.mma_us == pytest.approx(1)
    assert floor.mma_plain_us == pytest.approx(2)
    assert (floor.binds, floor.floor_us) == ("memory", floor.memory_us)


def test_the_mma_binds_and_fewer_sms_take_longer():
    counters = made(unique=1792, macs=170 * 1024 * 2850 * 10, sure=170 * 4 * 2850 * 3)
    floor = floor_of(counters, RTX5090)
    assert (floor.binds, floor.floor_us) == ("mma", pytest.approx(10))
    assert floor.issue_us == pytest.approx(3)
    assert floor_of(counters, RTX5090, sms=17).floor_us == pytest.approx(100)


def test_issue_slots_bind():
    floor = floor_of(made(sure=48 * 4 * 2440 * 7), GB10)
    assert (floor.binds, floor.floor_us) == ("issue", pytest.approx(7))


def test_a_cta_has_one_sm_for_itself():
    """A grid of one CTA is not done 170 times as fast."""
    work = Work(issued=0, surely_issued=4 * 2850, multiply_adds={"block_scaled": 1024 * 2850 * 5})
    floor = floor_of(Counters(work=work, busiest_cta=work, unique_bytes={}), RTX5090)
    assert (floor.mma_us, floor.issue_us) == (pytest.approx(5), pytest.approx(1))


def test_a_rate_that_nobody_knows_is_no_part_of_the_floor():
    counters = made(unique=273_000, macs=10**12, form="plain")
    floor = floor_of(counters, GB10)
    assert (floor.mma_us, floor.mma_plain_us) == (None, None)
    assert (floor.binds, floor.floor_us) == ("memory", pytest.approx(1))
    assert floor_of(made(macs=10**9), GB10).mma_plain_us is None
    assert floor_of(made(macs=10**9), GB10).mma_us > 0
    assert floor_of(made(macs=10**9, form="bf16"), RTX5090).mma_us is None
    assert floor_of(made(macs=0, form="bf16"), RTX5090).mma_us == 0


def test_launches_add_up_and_their_busiest_ctas_do_not():
    one = made(unique=5, macs=100, sure=10, busiest=Work(9, 7, {"block_scaled": 60}))
    two = made(unique=5, macs=200, sure=30, busiest=Work(8, 8, {"block_scaled": 50}))
    found = total([one, two], Touched())
    assert (found.work.surely_issued, found.work.multiply_adds) == (40, {"block_scaled": 300})
    assert found.busiest_cta == Work(9, 8, {"block_scaled": 60})
    assert found.unique_bytes == {"loaded": 0, "stored": 0}, "that is not the sum of theirs"
    assert one.work.multiply_adds == {"block_scaled": 100}, "left as it was"


@pytest.fixture
def shipped(monkeypatch):
    monkeypatch.setattr(emulated, "BACKEND", None)
    stand_in.reset(monkeypatch)
    yield
    stand_in.reset(monkeypatch)


COMMAND = ("emulate", "--variant", "fp8_ptr_array_128x32x128_swap_bf16", "--m", "5,0,40", "--n", "136")
COMMAND += ("--k", "144", "--sms", "4")


def test_json_has_counters_floor_and_how_far_it_is_from_the_least(shipped, capsys):
    assert main([*COMMAND, "--json", "--check", "--device", "gb10"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["ok"], found["violations"]) == (True, [])
    gemm = found["launches"][1]["counters"]
    prepare = found["launches"][0]["counters"]
    counters = found["counters"]
    assert counters["work"]["issued"] == gemm["work"]["issued"] + prepare["work"]["issued"]
    assert counters["shared_memory"]["ldmatrix"]["conflicts"] == 0
    assert counters["mma"] == gemm["mma"]
    assert any(line["text"].startswith("ldmatrix") for line in gemm["by_line"])
    assert counters["unique_bytes"]["stored"] >= 45 * 136 * 2
    # What preparation stored is not loaded once more.
    assert counters["unique_bytes"]["loaded"] < gemm["unique_bytes"]["loaded"]
    floor = found["floor"]
    terms = [floor["memory_us"], floor["mma_us"], floor["issue_us"]]
    assert found["floor_us"] == floor["floor_us"] == max(terms) > 0
    assert floor["mma_plain_us"] is None
    assert floor["note"] == "a bound from counted work with a cold L2, not a measurement"
    assert [launch["variant"] for launch in floor["launches"]] == [
        launch["variant"] for launch in found["launches"]
    ]
    assert floor["rates"]["block_scaled_flop_per_clock_and_sm"] == [2048, "assumed"]
    efficiency = found["efficiency"]
    least = 2 * 136 * (144 + 4) + 45 * (144 + 4) + 45 * 136 * 2 + 4 * 4
    assert efficiency["least_bytes"] == least
    assert 1 <= efficiency["unique_over_least"] <= efficiency["requested_over_least"]
    assert efficiency["useful_multiply_adds"] == 45 * 136 * 144
    assert (
        efficiency["useful_fraction"]
        == 45 * 136 * 144 / counters["mma"][next(iter(counters["mma"]))]["multiply_adds"]
    )


def test_the_text_has_them_for_each_launch_and_the_call(shipped, capsys):
    assert main([*COMMAND, "--device", "rtx5090"]) == 0
    printed = capsys.readouterr().out
    assert "counted    fp8_ptr_array_128x32x128_swap_bf16: " in printed
    assert printed.count("floor      ") == 3
    assert "floor      whole call: " in printed
    assert "with the plain MMA" in printed
    assert "a bound from counted work with a cold L2, not a measurement: 1792 GB/s" in printed
    assert "of multiply-adds are the problem's" in printed
    assert "no bank conflicts" in printed
    assert "TMA " in printed
    assert "mbarrier waits: " in printed
    assert "2048 FLOP per clock and SM (measured by others)" in printed


def test_without_counters_there_are_none(shipped, capsys):
    assert main([*COMMAND, "--json", "--no-counters"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["counters"], found["floor_us"], found["launches"][0]["counters"]) == (None, None, None)
    assert main([*COMMAND, "--no-counters"]) == 0
    assert "floor" not in capsys.readouterr().out


def test_a_device_without_rates_of_its_mma_says_so(shipped, capsys):
    assert main([*COMMAND, "--device", "h200"]) == 0
    printed = capsys.readouterr().out
    assert "MMA unknown" in printed
