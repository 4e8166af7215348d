"""cuLaunchKernelEx of the emulated driver: attributes, launches that are held back, when errors surface."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from emulated import stand_in
from emulated.kernels import kernel
from sm12x import driver as runtime
from sm12x import emulator, launch_config
from sm12x.emulator import driver
from sm12x.emulator.errors import EmulatorError
from sm12x.emulator.launch import load

PARAM = ".param .b64 buffer"
TID = """
    ld.param.b64 %rd1, [buffer];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.u64 %rd1, %rd1, %rd2;
"""
WRITE = TID + "griddepcontrol.launch_dependents;\nadd.u32 %r2, %r1, 5;\nst.global.b32 [%rd1], %r2;"
TWICE = TID + "{}\nld.global.b32 %r2, [%rd1];\nshl.b32 %r2, %r2, 1;\nst.global.b32 [%rd1], %r2;"
WAIT = "griddepcontrol.wait;"
PROGRAMMATIC = (launch_config.PROGRAMMATIC_STREAM_SERIALIZATION, 1)


class Driver:
    """An emulated device with a buffer of 32 words that nobody wrote, and kernels of our own."""

    def __init__(self):
        self.device = driver.open_device()
        self.hot, self.call = self.device.driver.hot, self.device.driver.call
        with runtime.current(self.device):
            self.buffer = self.call("cuMemAlloc", 128)
        self.parameter = ctypes.c_uint64(self.buffer)
        self.arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self.parameter))

    def function(self, body, variant="ours"):
        made = driver._emulator
        module = load(kernel(body, params=PARAM), made.memory)
        library = driver._Library(module, variant, "sm_120a")
        return made._new(driver._Function(library, module.kernel("test"), "test"))

    def launch(self, function, *attributes, stream=0, blocks=1):
        listed = (launch_config.LaunchAttribute * max(1, len(attributes)))()
        for each, (name, *value) in zip(listed, attributes, strict=False):
            each.id, each.value[: len(value)] = name, value
        config = launch_config.LaunchConfig(blocks, 1, 1, 32, 1, 1, 0, stream, listed, len(attributes))
        return self.hot.cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(function), self.arguments, None
        )

    def launch_plainly(self, function):
        sizes = map(ctypes.c_uint, (1, 1, 1, 32, 1, 1, 0))
        return self.hot.cuLaunchKernel(
            ctypes.c_void_p(function), *sizes, ctypes.c_void_p(0), self.arguments, None
        )

    def words(self):
        target = np.zeros(32, np.uint32)
        self.call("cuMemcpyDtoHAsync", target.ctypes.data, self.buffer, 128, 0)
        return target.tolist()


@pytest.fixture
def cuda(monkeypatch):
    stand_in.reset(monkeypatch)
    made = Driver()
    with runtime.current(made.device):
        yield made
    stand_in.reset(monkeypatch)


EXPECTED = [2 * (lane + 5) for lane in range(32)]


@pytest.mark.parametrize("seed", range(6))
def test_a_programmatic_launch_waits_for_its_predecessor(cuda, seed):
    with emulator.use(seed=seed) as session:
        write, twice = cuda.function(WRITE), cuda.function(TWICE.format(WAIT))
        assert cuda.launch(write) == 0
        assert cuda.launch(twice, PROGRAMMATIC) == 0
        assert session.launches == [], "both are held"
        assert cuda.words() == EXPECTED
        assert [each.grid for each in session.launches] == [(1, 1, 1)] * 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("first", ["launch", "launch_plainly"])
def test_what_goes_wrong_surfaces_at_the_next_call_that_waits(cuda, seed, first):
    """A primary that triggers is held however it is launched."""
    with emulator.use(seed=seed) as session:
        write, twice = cuda.function(WRITE), cuda.function(TWICE.format(""))
        assert getattr(cuda, first)(write) == 0
        assert cuda.launch(twice, PROGRAMMATIC) == 0
        with pytest.raises(
            EmulatorError, match="dependency: test (reads|writes) .* before its griddepcontrol"
        ):
            cuda.call("cuStreamSynchronize", 0)
        assert session.failed == "ours"
        cuda.call("cuStreamSynchronize", 0)


@pytest.mark.parametrize("seed", range(2))
def test_the_kernel_of_a_chain_that_fails_is_the_one_that_failed(cuda, seed):
    with emulator.use(seed=seed) as session:
        wrong = cuda.function(TID + "st.global.b32 [%rd1+4096], %r1;", "wrong")
        assert cuda.launch(wrong) == 0
        assert cuda.launch(cuda.function(WAIT, "right"), PROGRAMMATIC) == 0
        with pytest.raises(EmulatorError, match="bounds"):
            cuda.call("cuStreamSynchronize", 0)
        assert session.failed == "wrong"


@pytest.mark.parametrize(
    "wait",
    [
        lambda c: c.call("cuStreamSynchronize", 0),
        lambda c: c.call("cuMemFree", c.buffer),
        lambda c: c.words(),
        lambda c: driver.finish(),
        lambda c: c.launch_plainly(c.function("ret;")),
    ],
)
def test_what_makes_held_launches_run(cuda, wait):
    with emulator.use() as session:
        assert cuda.launch(cuda.function(WRITE)) == 0
        assert not session.launches
        wait(cuda)
        assert session.launches


def test_without_the_attribute_or_on_another_stream_a_launch_waits_for_all(cuda):
    twice = cuda.function(TWICE.format(""))
    stream = cuda.call("cuStreamCreate", 0)
    for second in ((), ((launch_config.PROGRAMMATIC_STREAM_SERIALIZATION, 0),)):
        assert cuda.launch(cuda.function(WRITE)) == 0
        assert cuda.launch(twice, *second) == 0
        assert cuda.words() == EXPECTED
    assert cuda.launch(cuda.function(WRITE)) == 0
    assert cuda.launch(twice, PROGRAMMATIC, stream=stream) == 0
    assert cuda.words() == EXPECTED


def test_a_kernel_that_triggers_nothing_has_ended_when_cu_launch_kernel_returns(cuda):
    with emulator.use() as session:
        cuda.launch_plainly(cuda.function(WRITE.replace("griddepcontrol.launch_dependents;", "")))
        assert len(session.launches) == 1
        assert cuda.launch(cuda.function(TWICE.format("")), PROGRAMMATIC) == 0
        assert cuda.words() == EXPECTED


@pytest.mark.parametrize("seed", range(5))
def test_cooperative_launches_have_all_their_ctas_at_once(cuda, seed):
    together = cuda.function(f"""
    {TID}
    mov.b32 %r2, 1;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 red.release.gpu.global.add.u32 [%rd1], %r2;
    ld.param.b64 %rd3, [buffer];
    AGAIN:
    ld.acquire.gpu.global.b32 %r3, [%rd3];
    setp.lt.u32 %p2, %r3, 4;
    @%p2 bra AGAIN;
    """)
    with emulator.use(seed=seed):
        cuda.call("cuMemsetD8Async", cuda.buffer, 0, 128, 0)
        assert cuda.launch(together, (launch_config.COOPERATIVE, 1), blocks=4) == 0
        assert cuda.words()[0] == 4


def test_what_is_refused(cuda):
    write = cuda.function(WRITE)
    assert cuda.launch(write, (launch_config.CLUSTER_DIMENSION, 2, 1, 1)) == 801
    assert cuda.launch(write, (launch_config.CLUSTER_DIMENSION, 1, 1, 1), (launch_config.PRIORITY, 3)) == 0
    assert cuda.launch(write, (7, 1)) == 801, "programmatic events"
    assert cuda.launch(77) == 400
    assert cuda.launch(write, stream=77) == 400
    assert cuda.launch(write, blocks=0) == 1
    assert cuda.hot.cuLaunchKernelEx(None, ctypes.c_void_p(write), cuda.arguments, None) == 1
    assert ctypes.sizeof(launch_config.LaunchAttribute) == 72
    assert ctypes.sizeof(launch_config.LaunchConfig) == 56
