"""Progress bars on stderr, by tqdm where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], label: str, total: int, *, enabled: bool = True) -> Iterable[T]:
    """`items`, with a bar on stderr once they have taken longer than a second.

    No bar where `enabled` is false, or where tqdm (extra ``demo``) is missing, which is then said instead.
    """
    if not enabled:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{label}: {total} steps (no progress bar: tqdm is not installed)", file=sys.stderr)
        return items
    bar: Iterable[T] = tqdm(items, desc=label, total=total, delay=1.0, file=sys.stderr, leave=False)
    return bar
