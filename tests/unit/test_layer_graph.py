"""What counts as an allocation, copy or wait of a layer's call in the GPU tests: the count notices each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unit.fake_driver import install
from unit.layer_cases import make, run, tokens, weights

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

import layer_graph  # noqa: E402

from sm12x import driver  # noqa: E402


@pytest.fixture
def fake(monkeypatch, layer_root):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats)
    stats = {"allocation.all.allocated": 5}
    fake = install(monkeypatch, layer_root)
    fake.stats = stats
    return fake


def test_a_first_call_allocates_and_a_warm_one_does_not(fake):
    layer, call = make(weights(fake)), tokens(fake)
    with layer_graph.counted_allocations() as counts:
        run(layer, call)
    assert counts["cuMemAlloc"] == 1
    with layer_graph.counted_allocations() as counts:
        for _ in range(3):
            run(layer, tokens(fake))
    assert not counts


def test_memory_of_the_streams_order_and_of_torch_is_noticed(fake):
    device = driver.get_device(0)
    with layer_graph.counted_allocations() as counts:
        with driver.current(device), driver.temporary(device, 64, 7):
            pass
        fake.stats["allocation.all.allocated"] += 2
    assert counts == {"cuMemAllocAsync": 1, "cuMemFreeAsync": 1, "torch": 2}
    before = driver.Driver.call
    with pytest.raises(KeyError), layer_graph.counted_allocations():
        raise KeyError
    assert driver.Driver.call is before
