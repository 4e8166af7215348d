"""The demo's GPU part on a fake driver: what it launches and times, and that it gives its memory back."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest

import sm12x
from sm12x import device_memory
from sm12x.checkpoint import make_checkpoint
from sm12x.cli import demo_gpu, workload
from unit import fake_driver
from unit.checkpoints import new_seed
from unit.fake_driver import real_bindings
from unit.fake_memory import DriverWithMemory

REPLAY_MS = 0.64


class DriverWithGraphs(DriverWithMemory):
    """A graph does nothing when it is launched, and takes REPLAY_MS."""

    def do_cuDeviceGetAttribute(self, attribute, device):
        if attribute.name == "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE":
            return 1000
        return super().do_cuDeviceGetAttribute(attribute, device)

    def do_cuStreamBeginCapture(self, stream, mode):
        self.log.append(("begin", int(stream)))

    def do_cuStreamEndCapture(self, stream):
        self.log.append(("end", int(stream)))
        return real_bindings.CUgraph(1)

    def do_cuGraphInstantiate(self, graph, flags):
        return real_bindings.CUgraphExec(2)

    def do_cuGraphLaunch(self, graph, stream):
        self.log.append(("graph", int(stream)))

    def do_cuGraphExecDestroy(self, graph):
        return None

    def do_cuGraphDestroy(self, graph):
        return None

    def do_cuEventSynchronize(self, event):
        return None

    def do_cuEventElapsedTime(self, start, end):
        return REPLAY_MS


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(fake_driver, "FakeDriver", DriverWithGraphs)
    return fake_driver.install(monkeypatch, tmp_path)


class Layer:
    """`sm12x.fused_moe` and `sm12x.FusedMoE` on host memory that passes for a device's: they note their
    calls, and each leaves its number in out."""

    def __init__(self, monkeypatch):
        self.single, self.plans, self.planned = [], [], []
        monkeypatch.setattr(sm12x, "fused_moe", self.fused_moe)
        monkeypatch.setattr(sm12x, "FusedMoE", self.plan, raising=False)

    def fused_moe(self, x, *, topk_weights, topk_ids, out, stream, **layer):
        self.single.append({"x": x, "ids": topk_ids, "stream": stream, **layer})
        self.leave(out, 3)

    def plan(self, w1, w2, **layer):
        self.plans.append({"w1": w1, **layer})
        return self.call

    def call(self, x, topk_weights, topk_ids, *, out, stream):
        self.planned.append((x.ptr, topk_weights.ptr, topk_ids.ptr, out.ptr, stream))
        self.leave(out, 9)

    @staticmethod
    def leave(out, number):
        values = np.full(out.shape, number, np.uint16)
        ctypes.memmove(out.ptr, values.ctypes.data, values.nbytes)


@pytest.fixture
def made(fake, tmp_path):
    folder = tmp_path / "checkpoint"
    make_checkpoint(folder, layers=2, num_experts=32, top_k=8, seed=new_seed())
    return folder, workload.build(folder, 1, 1, 1, show_progress=False)


def test_a_graph_of_calls_on_rotated_experts_is_timed_and_everything_is_freed(fake, made, monkeypatch):
    folder, work = made
    layer = Layer(monkeypatch)
    routings = len(demo_gpu.rotations(work))
    assert routings == 4
    result = demo_gpu.run(work, folder, demo_gpu.open_device())
    assert result.rotated_bytes == routings * 8 * work.expert_bytes()
    assert result.l2_bytes == 1000
    assert result.time_us == pytest.approx(1e3 * REPLAY_MS / demo_gpu.LAUNCHES_PER_GRAPH)

    order = [entry[0] for entry in fake.log]
    assert order.count("graph") == 2 + demo_gpu.REPLAYS  # two to warm up
    (stream,) = {entry[-1] for entry in fake.log if entry[0] in ("begin", "graph")}
    assert {call[-1] for call in layer.planned} == {stream}
    assert len(layer.planned) == 1 + demo_gpu.LAUNCHES_PER_GRAPH
    captured = [call[2] for call in layer.planned[1:]]
    assert len(set(captured)) == routings
    assert captured[:routings] == captured[routings : 2 * routings]  # all others come between
    assert len(layer.plans) == 1
    layer.single.clear()
    layer.plans.clear()
    gc.collect()
    assert not fake.blocks


def test_the_layer_on_the_device_is_that_of_the_files(fake, made, monkeypatch):
    folder, work = made
    layer = Layer(monkeypatch)
    device = demo_gpu.open_device()
    demo_gpu.run(work, folder, device)
    (call,) = layer.single
    for name in ("w1", "w2", "w1_scale", "w2_scale"):
        held = device_memory.download(device, call[name], 0)
        np.testing.assert_array_equal(held.view(np.uint8), getattr(work.layer, name).view(np.uint8))
    x = device_memory.download(device, call["x"], 0)
    np.testing.assert_array_equal(x.view(np.uint16), work.x.view(np.uint16))
    np.testing.assert_array_equal(device_memory.download(device, call["ids"], 0), work.topk_ids)
    assert call["activation"] == "gelu_tanh"
    assert layer.plans[0]["w1"] is call["w1"]


def test_the_result_is_what_the_first_call_left(fake, made, monkeypatch):
    folder, work = made
    Layer(monkeypatch)
    out = demo_gpu.run(work, folder, demo_gpu.open_device()).out
    assert out.shape == (1, 64)
    assert (out.view(np.uint16) == 3).all()
