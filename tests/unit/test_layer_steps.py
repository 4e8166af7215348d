"""A benchmark's way to one launch of a layer alone, on a fake driver."""

from __future__ import annotations

import sys
import types
from pathlib import Path

from unit.fake_driver import install
from unit.layer_cases import STREAM, TOP, T, make, run, tokens, weights

ROOT = Path(__file__).resolve().parents[2]


def test_a_launch_of_a_layer_is_launched_alone_with_the_addresses_of_the_whole_call(monkeypatch, layer_root):
    for folder in ("tests/benchmarks", "tests/gpu"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    stub = types.ModuleType("layer_batch")  # needs torch
    stub.Call = stub.LayerBatch = object
    monkeypatch.setitem(sys.modules, "layer_batch", stub)
    import layer_steps  # no other test does

    sys.modules.pop("layer_steps")  # it holds on to the stub

    fake = install(monkeypatch, layer_root)
    fake.streams[0] = STREAM
    layer, call = make(weights(fake)), tokens(fake)
    workspace = fake.tensor((layer.workspace_size(T, TOP),), "uint8")
    run(layer, {**call, "workspace": workspace})
    whole = [bytes(each.params) for each in fake.launches]
    batch = types.SimpleNamespace(**call)
    assert len(layer_steps.step_names(layer, batch, workspace, STREAM)) == len(whole) == 4
    monkeypatch.setattr(layer_steps.shapes, "rotation", lambda sets: [(0, 0)])
    for index, params in enumerate(whole):
        fake.launches.clear()
        (alone,) = layer_steps.step_calls([batch], [layer], [workspace], STREAM, index)
        alone()
        assert [bytes(each.params) for each in fake.launches] == [params]
