"""Progress bars on stderr, by tqdm where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def counting(unit: str, *, enabled: bool = True) -> Iterator[Callable[[str, int], None] | None]:
    """Something to call with a label and how many units of it are done, whose number nobody knows before. It
    shows them on stderr once it has taken longer than a second; None where `enabled` is false or tqdm is
    missing.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        enabled = False
    if not enabled:
        yield None
        return
    with tqdm(unit=f" {unit}", delay=1.0, file=sys.stderr, leave=False) as bar:

        def show(label: str, done: int) -> None:
            if done < bar.n:  # the next thing has begun
                bar.reset()
            bar.set_description_str(label, refresh=False)
            bar.update(done - bar.n)

        yield show
