"""Watching memory: who wants to know of accesses implements Observer, and asks `actor` who made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..memory import Array, Region


class Observer(Protocol):
    """Somebody who wants to know of accesses to a region: `size` bytes at each of the addresses (n,), all
    within the region. They are told before anything has changed; `changes` finds out whether it will. What
    they raise is the accessing instruction's doing.
    """

    def read(self, region: Region, address: Array, size: int) -> None: ...

    def write(self, region: Region, address: Array, size: int, changes: Callable[[], bool]) -> None: ...
