"""The demo's GPU part on a fake driver: what it launches and times, and that it gives its memory back."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest

from sm12x.cli import demo_gpu, workload
from unit import fake_driver
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
    monkeypatch.setattr(workload, "K", 64)
    monkeypatch.setattr(workload, "N", 48)
    return fake_driver.install(monkeypatch, tmp_path)


def test_a_graph_of_calls_on_rotated_experts_is_timed_and_everything_is_freed(fake):
    made = workload.build(1, 32, 1, show_progress=False)
    routings = len(demo_gpu.rotations(made))
    assert routings == 4
    result = demo_gpu.run(made, demo_gpu.open_device())
    assert result.out.shape == (8, 48)
    assert result.variant in {launch.symbol.removeprefix("sm12x_") for launch in fake.launches}
    assert result.rotated_bytes == routings * 8 * 48 * 64
    assert result.l2_bytes == 1000

    order = [entry[0] for entry in fake.log]
    first, captured = order[: order.index("begin")], order[order.index("begin") : order.index("end")]
    # The kernel that prepares, and the GEMM.
    assert (first.count("launch"), captured.count("launch")) == (2, 2 * demo_gpu.LAUNCHES_PER_GRAPH)
    assert {entry[-1] for entry in fake.log if entry[0] in ("launch", "graph")} == {
        fake.log[order.index("begin")][1]
    }
    assert order.count("graph") == 2 + demo_gpu.REPLAYS  # two to warm up
    assert result.time_us == pytest.approx(1e3 * REPLAY_MS / demo_gpu.LAUNCHES_PER_GRAPH)
    offsets = [launch.params.offsets for launch in fake.launches if hasattr(launch.params, "offsets")]
    assert len(set(offsets)) == routings
    gc.collect()
    assert not fake.blocks


def test_the_result_is_what_the_first_call_left(fake, monkeypatch):
    made = workload.build(1, 32, 1, show_progress=False)
    left = np.full((8, 48), 3, np.uint16)

    def call(*args, out, **kwargs):
        ctypes.memmove(out.ptr, left.ctypes.data, left.nbytes)
        left[:] = 9

    monkeypatch.setattr(demo_gpu.sm12x, "grouped_gemm", call)
    assert (demo_gpu.run(made, demo_gpu.open_device()).out.view(np.uint16) == 3).all()
