"""Deriving floors of calls too large to emulate: arithmetic on small numbers, and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from benchmarks import kernel_work, packed_counters, packed_report  # noqa: E402
from benchmarks.kernel_work import Call, Issue  # noqa: E402
from sm12x.emulator.devices import GPUS  # noqa: E402
from sm12x.manifest import Variant  # noqa: E402
from sm12x.validation.shapes import MOE_GEMMS, ROUTINGS  # noqa: E402


def variant(key, tile, *, swap_ab=True, family=kernel_work.PACKED, token_step=0):
    outs = ("bfloat16",)
    return Variant(
        key,
        family,
        "gemm",
        "p",
        key,
        192,
        0,
        {},
        tile=tile,
        swap_ab=swap_ab,
        outs=outs,
        token_step=token_step,
    )


NARROW = variant("fp8_packed_128x8x128_swap", (128, 8, 128))
WIDE = variant("fp8_packed_128x128x128_coop", (128, 128, 128), swap_ab=False)
OTHER = variant("fp8_ptr_array_128x64x128_swap_bf16", (128, 64, 128), family="fp8_ptr_array", token_step=16)
NO_ISSUE = Issue(0.0, 0.0, 0.0)
CALL = Call((9, 0, 200), 200, 400)


def test_multiply_adds_are_padded_as_each_kernel_pads():
    assert kernel_work.multiply_adds(NARROW, CALL, 1) == (16 + 200) * 208 * 416
    # 27 tiles of tokens of 25 strips each: 225 units for each of 3 CTAs. The first ends 175 units into the
    # large group, at strip 7 of 25, the second at strip 16: 7, 9 and 9 strips are 4, 5 and 5 MMAs wide.
    assert kernel_work.multiply_adds(NARROW, CALL, 3) == (16 * 208 + 200 * (64 + 80 + 80)) * 416
    assert kernel_work.multiply_adds(NARROW, CALL, 8, split=True) == (16 + 200) * 208 * 416
    assert kernel_work.multiply_adds(WIDE, CALL, 8) == (128 + 256) * 256 * 416
    assert kernel_work.multiply_adds(OTHER, CALL, 8) == (16 + 208) * 256 * 512
    assert CALL.multiply_adds == 209 * 200 * 400


def test_the_least_bytes_are_those_of_groups_with_rows():
    assert CALL.least_loaded == 2 * 200 * 404 + 209 * 404 + 16
    assert CALL.least_stored == 209 * 200 * 2


def test_the_busiest_cta_has_whole_tiles_or_an_equal_run_of_strips():
    assert kernel_work.tiles(WIDE, CALL, 4) == 3 * 2
    assert kernel_work.busiest_share(WIDE, CALL, 4) == pytest.approx(2 / 6)
    # 168 or 169 units each; the large group is parted at strips 5, 12 and 19.
    each = [16 * (112 + 96) + 200 * 48, 200 * 64, 200 * 64, 200 * 48]
    assert kernel_work.busiest_share(NARROW, CALL, 4) == pytest.approx(max(each) / sum(each))
    assert kernel_work.tiles(NARROW, CALL, 4) == 2 * 2 + 4 * 25
    # Four tiles of tokens, 17 CTAs: four keep to each, one stays idle; all pieces lie in one group.
    assert kernel_work.tiles(NARROW, Call((8,) * 4, 200, 400), 17) == 16
    assert kernel_work.busiest_share(NARROW, Call((8,) * 4, 200, 400), 17) == pytest.approx(1 / 13)
    assert kernel_work.busiest_share(WIDE, Call((0,), 8, 16), 4) == 0


def test_issue_slots_are_told_apart():
    issue = Issue(100.0, 30.0, 7.0)
    one, deeper, wider = 100 + 30 + 2 * 7, 100 + 30 + 5 * 7, 100 + 2 * (30 + 2 * 7)
    assert kernel_work.fit_issue((2, 5), one, deeper, wider) == issue
    derived = kernel_work.derived_counters(WIDE, CALL, 3, issue)
    assert derived.work.surely_issued == 3 * 100 + 6 * (30 + 4 * 7)
    assert derived.busiest_cta.surely_issued == pytest.approx(100 + 2 * (30 + 4 * 7))


@pytest.mark.parametrize(("device", "plain"), [("rtx5090", 2.0), ("gb10", 2.0)])
def test_a_plain_build_takes_twice_as_long_where_mmas_bind(device, plain):
    """Where the rate is known, and where it is assumed."""
    gpu = GPUS[device]
    found = packed_counters.floors(WIDE, NO_ISSUE, [Call((4096,) * 4, 4096, 4096)], gpu)
    assert found["binds"] == "mma"
    assert found["plain_floor_us"] == pytest.approx(plain * found["floor_us"])
    small = packed_counters.floors(NARROW, NO_ISSUE, [Call((1,) * 4, 4096, 4096)], gpu)
    assert small["binds"] == "memory"
    assert small["plain_floor_us"] == small["floor_us"]


def test_the_problems_own_terms():
    own = packed_counters.own_terms([Call((1,), 1792, 1000)], GPUS["rtx5090"])
    assert own["memory_us"] == pytest.approx((1792 * 1004 + 1004 + 8 + 3584) / 1792e3)
    assert own["mma_us"] == pytest.approx(1792 * 1000 / 1024 / 170 / 2850)
    assert own["mma_plain_us"] == pytest.approx(2 * own["mma_us"])
    assert own["bound"] == "memory"
    assert packed_counters.own_terms([Call((8192,), 4096, 4096)], GPUS["gb10"])["bound"] == "MMA"


def test_of_equal_floors_the_one_that_asks_for_least_is_taken():
    def made(key, floor, asked):
        return {"variant": key, "floor_us": floor, "asked_of_l2": asked, "mma_us": 1.0}

    choices = [made("a", 100.0, 9), made("b", 100.9, 5), made("c", 102.0, 1)]
    assert packed_counters.best(choices)["variant"] == "b"


def test_routings_are_the_same_each_time():
    first, again = (packed_counters.routed_calls(MOE_GEMMS[0], 8) for _ in range(2))
    assert first == again
    assert len(first) == ROUTINGS
    assert {call.total_rows for call in first} == {8 * MOE_GEMMS[0].top_k}


def test_the_whole_command_writes_json_and_the_report(tmp_path, monkeypatch, capsys):
    """Without the emulator: what it counts is given."""

    class Held:
        def __init__(self):
            self.toolchain = {"nvcc": "13"}

        def gemms(self, family):
            return [each for each in (NARROW, WIDE, OTHER) if each.family == family]

    useful = dict.fromkeys(packed_counters.ROWS, 0.5)
    counted = packed_counters.Counted(0, 0, 1.0, 1.5, useful, True, Issue(1.0, 2.0, 3.0))
    for each in (NARROW, WIDE, OTHER):
        monkeypatch.setitem(each.targets, "sm_120a", type("Target", (), {"ptx": {"sources_sha256": "0"}}))
    monkeypatch.setattr(packed_counters.manifest, "default", Held)
    monkeypatch.setattr(packed_counters, "count", lambda variant: counted)
    monkeypatch.setattr(packed_counters, "TOKENS", (1, 8192))
    assert packed_counters.main(["--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*_packed_counters.json")
    result = json.loads(written.read_text())
    text = written.with_suffix(".md").read_text()
    assert text == packed_report.markdown(result)
    assert "assumed" in text
    assert "Nothing was measured on an SM12x device" in text
    assert "| `fp8_packed_128x8x128_swap` | 50.0% |" in text
    lines = [line for line in text.splitlines() if line.startswith("| mixtral-8x7B GEMM1 | 8192 |")]
    assert len(lines) == 2
    assert "| 2048.0 | 1947.1 | MMA | " in lines[0]
    assert any(line.startswith("| RTX 5090 | mixtral-8x7B GEMM1 | 8192 |") for line in text.splitlines())
    broken = packed_counters.Counted(1, 1, 1.0, 1.5, useful, True, Issue(1.0, 2.0, 3.0))
    monkeypatch.setattr(packed_counters, "count", lambda variant: broken)
    assert packed_counters.main(["--out", str(tmp_path)]) == 1
    assert "bank conflicts" in capsys.readouterr().err
