"""Random, legal sequences of mbarrier instructions of one thread, as PTX that stores what each one gives.

What an arrival's state is good for: mbarrier.pending_count and mbarrier.test_wait. Numbers of the pending
count and of transaction bytes are followed while a script is made, so that it never breaks a rule.
"""

from __future__ import annotations

import random

COUNT = 24
STEPS = 24


def script(seed: int) -> tuple[str, list[int]]:
    """A kernel's body, and the words, four bytes each, that it stores: what instructions gave, in order."""
    rng = random.Random(seed)
    expected = rng.choice([1, 2, 3, 7, 40, (1 << 20) - 1 if seed == 3 else 5])
    pending, tx, phase = expected, 0, 0
    lines = [f"    mbarrier.init.shared::cta.b64 [bar], {expected};"]
    words: list[int] = []

    def keep(register: str, value: int) -> None:
        lines.append(f"    st.global.u32 [%rd5+{4 * len(words)}], {register};")
        words.append(value)

    def end_of_phase() -> None:
        nonlocal pending, phase
        if pending == 0 and tx == 0:
            pending, phase = expected, phase + 1

    def waits() -> None:
        for parity in (0, 1):
            lines.append(f"    mbarrier.test_wait.parity.shared::cta.b64 %p5, [bar], {parity};")
            lines.append("    selp.u32 %r30, 1, 0, %p5;")
            keep("%r30", int(phase & 1 != parity))

    states = 0
    for _ in range(STEPS):
        if len(words) > 56:
            break
        choice = rng.choice(["arrive", "arrive", "count", "no_complete", "drop", "expect", "tx", "arrive_tx"])
        state, was_pending, was_phase = f"%rd{30 + states % 8}", pending, phase
        if pending == 0 and choice not in ("tx", "expect"):
            choice = "tx"
        if choice == "arrive":
            lines.append(f"    mbarrier.arrive.shared::cta.b64 {state}, [bar];")
            pending -= 1
        elif choice == "count":
            count = rng.randint(1, pending)
            lines.append(f"    mbarrier.arrive.shared::cta.b64 {state}, [bar], {count};")
            pending -= count
        elif choice == "no_complete":
            if pending < 2:
                continue
            count = rng.randint(1, pending - 1)
            lines.append(f"    mbarrier.arrive.noComplete.shared::cta.b64 {state}, [bar], {count};")
            pending -= count
        elif choice == "drop":
            if expected < 2:
                continue
            lines.append(f"    mbarrier.arrive_drop.shared::cta.b64 {state}, [bar];")
            pending, expected = pending - 1, expected - 1
        elif choice == "arrive_tx":
            size = 16 * rng.randint(1, 100)
            lines.append(f"    mbarrier.arrive.expect_tx.shared::cta.b64 {state}, [bar], {size};")
            pending, tx = pending - 1, tx + size
        elif choice == "expect":
            if pending == 0 and tx == 0:
                continue
            size = rng.randint(1, 3000)
            lines.append(f"    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], {size};")
            tx += size
            waits()
            continue
        else:
            if tx == 0:
                continue
            size = tx if rng.random() < 0.6 else rng.randint(1, tx)
            lines.append(f"    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], {size};")
            tx -= size
            end_of_phase()
            waits()
            continue
        end_of_phase()
        lines.append(f"    mbarrier.pending_count.b64 %r30, {state};")
        keep("%r30", was_pending)
        lines.append(f"    mbarrier.test_wait.shared::cta.b64 %p5, [bar], {state};")
        lines.append("    selp.u32 %r30, 1, 0, %p5;")
        keep("%r30", int(phase != was_phase))
        states += 1
        waits()
    lines.append("    mbarrier.inval.shared::cta.b64 [bar];")
    return "\n".join(lines), words
