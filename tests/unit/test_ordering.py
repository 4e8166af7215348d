"""Events and streams go to the driver with the right flags, in the context of their own device."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from sm12x import driver, ordering
from sm12x.errors import CudaError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What reaches the driver, each call in front of the device whose context was current."""
    log: list[tuple[Any, ...]] = []
    current: list[int | None] = [None]

    @contextmanager
    def enter(device: int) -> Any:
        current.append(device)
        yield
        current.pop()

    def call(name: str, *arguments: Any, variant: str | None = None) -> int:
        log.append((current[-1], name, *arguments))
        return 0x100

    def query(event: int) -> tuple[int]:
        log.append((current[-1], "cuEventQuery", event))
        return (event,)  # the event's handle doubles as its status

    attributes = SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL="ordinal")
    bindings = SimpleNamespace(cuEventQuery=query, CUpointer_attribute=attributes)
    monkeypatch.setattr(driver, "get_driver", lambda: SimpleNamespace(bindings=bindings))
    monkeypatch.setattr(driver, "get_device", lambda ordinal: ordinal)
    monkeypatch.setattr(driver, "current", enter)
    monkeypatch.setattr(driver, "call", call)
    monkeypatch.setattr(driver, "cuda_error", lambda name, code: CudaError(name, code=code))
    return log


def test_streams_do_not_block_and_events_have_no_timing(calls: list[Any]) -> None:
    assert ordering.stream_create(3) == 0x100
    assert ordering.event_create(3) == 0x100
    assert calls == [(3, "cuStreamCreate", 1), (3, "cuEventCreate", 2)]


def test_default_streams_are_those_of_the_given_device(calls: list[Any]) -> None:
    ordering.event_record(0x200, 1, 4)
    ordering.stream_wait_event(1, 0x200, 5)
    assert calls == [(4, "cuEventRecord", 0x200, 1), (5, "cuStreamWaitEvent", 1, 0x200, 0)]


def test_events_are_awaited_and_destroyed_in_any_context(calls: list[Any]) -> None:
    ordering.event_synchronize(0x200)
    ordering.event_destroy(0x200)
    assert ordering.pointer_device(0x300) == 0x100
    assert calls == [
        (None, "cuEventSynchronize", 0x200),
        (None, "cuEventDestroy", 0x200),
        (None, "cuPointerGetAttribute", "ordinal", 0x300),
    ]


def test_pending_event_is_no_error_but_a_failed_one_is(calls: list[Any]) -> None:
    assert ordering.event_query(0)
    assert not ordering.event_query(600)
    with pytest.raises(CudaError) as caught:
        ordering.event_query(700)
    assert caught.value.code == 700
