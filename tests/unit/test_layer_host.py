"""The host benchmark of expert layers on a fake driver: every call launches, with fresh arrays, and nothing
of it allocates.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unit.fake_driver import Tensor, install

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import layer_host

from sm12x import driver


@pytest.fixture
def fake(monkeypatch, layer_root):
    return install(monkeypatch, layer_root)


def part(pool, index):
    size = {"bfloat16": 2, "float32": 4, "int32": 4}[pool.dtype.name]
    step = size
    for extent in pool.shape[1:]:
        step *= extent
    return Tensor(pool.address + index * step, pool.shape[1:], pool.dtype.name)


def test_every_way_to_call_launches_the_layer(fake):
    layer = layer_host.make_layer(fake.tensor, part)
    assert layer.launches == 4
    fake.launches.clear()
    allocated = len(fake.allocated), len(fake.kept)
    for name, call in layer.calls.items():
        before = len(fake.launches)
        for index in range(3):
            call(**layer.fresh(index))
        assert len(fake.launches) - before == 3 * layer.launches, name
    first = [launch.params for launch in fake.launches if launch.symbol.endswith("combine")]
    assert len({params.out for params in first}) == 3, "the same arrays came again"
    assert (len(fake.allocated), len(fake.kept)) == allocated


def test_costs_are_means_over_whole_batches(fake):
    layer = layer_host.make_layer(fake.tensor, part)
    count = []
    costs = layer_host.measure(layer, lambda: count.append(1), 100, lambda: None)
    assert costs["calls"] == 128
    assert costs["launches"] == 4
    for name in layer.calls:
        each = costs[name]
        assert each["call_us"] > each["bare_launches_us"] > 0
        assert each["above_us"] == pytest.approx(each["call_us"] - each["bare_launches_us"])


def test_bare_launches_are_as_many_and_programmatic(fake):
    layer = layer_host.make_layer(fake.tensor, part)
    device = driver.get_device(0)
    route = fake.launches[0]
    arguments = (layer_host.ctypes.c_void_p * 1)(layer_host.ctypes.addressof(route.params))
    function = device.functions["moe_route"]
    fake.launches.clear()
    pointer = device.driver.pointer(layer_host.ctypes.addressof(arguments))
    bare = layer_host.launches_of(device, function, pointer, 77, layer.launches)
    assert bare() == 0
    assert len(fake.launches) == 4
    assert all(
        launch.programmatic and launch.stream == 77 and launch.grid == (1, 1, 1) for launch in fake.launches
    )


def test_a_report_says_what_is_too_much(capsys):
    cost = {"call_us": 30.0, "bare_launches_us": 18.0, "above_us": 12.0}
    result = {
        "device": "a GPU",
        "costs": {
            "calls": 128,
            "launches": 4,
            layer_host.GATED: cost,
            "function": {**cost, "above_us": 99.0},
        },
        "costly_calls": {layer_host.GATED: {}, "function": {}},
    }
    assert layer_host.report(result) == 0
    cost["above_us"] = 12.1
    assert layer_host.report(result) == 1
    cost["above_us"] = 1.0
    result["costly_calls"]["function"] = {"cuMemAlloc": 1}
    assert layer_host.report(result) == 1
    assert "cuMemAlloc" in capsys.readouterr().out
