"""Counters of launches: zeroed once, one block for each workspace of a device, none shared."""

from __future__ import annotations

import threading

import pytest

import sm12x
from sm12x import abi, counters, driver
from unit.fake_driver import CONTEXT, FakeGpu, install

HIGH = 0x7E00_0000_0000


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path, packed=True)


def blocks(fake, device):
    """The addresses of all blocks in a device's memory, by the chunks that were allocated."""
    size = counters.block_bytes(device)
    return {chunk + i * size for chunk, total in fake.kept.items() for i in range(total // size)}


def test_every_workspace_has_a_block_of_its_own_and_keeps_it(fake):
    device = driver.get_device(0)
    workspaces = [HIGH + 4096 * i for i in range(counters.BLOCKS_PER_CHUNK + 3)]
    first = [counters.counters_of(device, each) for each in workspaces]
    assert [counters.counters_of(device, each) for each in workspaces] == first
    assert len(set(first)) == len(first)
    assert set(first) <= blocks(fake, device)
    assert len(fake.kept) == 2, "a chunk is cut into blocks, and one more when they are used up"
    zeroed = {(entry[1], entry[3]) for entry in fake.log if entry[0] == "memset" and entry[2] == 0}
    assert zeroed == set(fake.kept.items())


def test_a_block_has_a_counter_for_each_mma_warp_of_the_largest_grid(fake):
    device = driver.get_device(0)
    assert counters.block_bytes(device) >= 4 * 8 * device.sm_count
    assert counters.block_bytes(device) % 256 == 0


@pytest.mark.parametrize("sms", [1, 48, 170])
def test_a_block_holds_the_state_of_a_whole_layer_however_few_sms_there_are(monkeypatch, tmp_path, sms):
    install(monkeypatch, tmp_path, packed=True, gpus=[FakeGpu(sm_count=sms)])
    size = counters.block_bytes(driver.get_device(0))
    assert size >= 4 * (abi.SM12X_LAYER_STATE + abi.SM12X_LAYER_STRIPS)
    assert size % 256 == 0


def test_devices_share_nothing(fake):
    one, two = driver.get_device(0), driver.get_device(1)
    assert counters.counters_of(one, HIGH) != counters.counters_of(two, HIGH)
    assert len(fake.kept) == 2


def test_memory_is_taken_in_the_devices_context_and_while_others_capture(fake):
    device = driver.get_device(1)
    seen = []
    allocate = fake.do_cuMemAlloc

    def watched(size):
        seen.append((fake.context, fake.capture_mode.name))
        return allocate(size)

    fake.bindings.cuMemAlloc = lambda size: (0, watched(size))
    before = fake.capture_mode
    counters.counters_of(device, HIGH)
    assert seen == [(CONTEXT + 1, "CU_STREAM_CAPTURE_MODE_RELAXED")]
    assert (fake.context, fake.capture_mode) == (0, before), "both are put back"


def test_a_failure_is_an_error_and_the_next_call_tries_again(fake):
    device = driver.get_device(0)
    fake.fail["cuMemsetD8Async"] = [2]
    with pytest.raises(sm12x.CudaError, match="cuMemsetD8Async"):
        counters.counters_of(device, HIGH)
    assert device.counters == {}
    assert counters.counters_of(device, HIGH) in blocks(fake, device)


def test_threads_that_ask_at_once_get_what_they_should(fake):
    device = driver.get_device(0)
    found: list[tuple[int, int]] = []
    start = threading.Barrier(8)

    def ask(thread):
        start.wait()
        for i in range(40):
            workspace = HIGH + 4096 * ((i * (thread + 1)) % 40)
            found.append((workspace, counters.counters_of(device, workspace)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 320
    pairs = set(found)
    assert len({workspace for workspace, _ in pairs}) == len({block for _, block in pairs}) == len(pairs)


def test_who_comes_second_takes_what_the_first_got(fake, monkeypatch):
    """Between the look without the lock and the one with it, another thread may have come."""
    device = driver.get_device(0)

    class Lock:
        def __enter__(self):
            device.counters[HIGH] = 0x1234

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(counters, "_lock", Lock())
    assert counters.counters_of(device, HIGH) == 0x1234
    assert fake.kept == {}


def test_a_forked_child_begins_without_any(fake):
    device = driver.get_device(0)
    counters.counters_of(device, HIGH)
    driver._after_fork_in_child()
    assert driver._devices == {}
    # Opened again, as a child that uses CUDA first would.
    assert driver.get_device(0).counters == {}
