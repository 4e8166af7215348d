"""The emulator against what an H200 and its driver did (tests/gpu/twins/sample.py makes the file)."""

import json
from collections import Counter
from pathlib import Path

from emulated.copies import encode_cases, on_emulator, sample

HELD = json.loads((Path(__file__).parent / "copies" / "hardware.json").read_text(encoding="utf-8"))


def test_copies_do_what_the_gpu_did():
    """Each case in every byte; what the GPU refused is refused."""
    wrong: Counter = Counter()
    shown = []
    for number, row in enumerate(HELD["cases"]):
        case = sample.case_of(row)
        outcome = on_emulator.run(case, number)
        if row.get("refused"):
            differs = "taken, where the GPU refuses" if outcome.error is None else None
        elif outcome.error:
            differs = outcome.error
        else:
            differs = ", ".join(sample.wrong_parts(row, case, outcome.arena))
        if differs:
            wrong[case.family] += 1
            shown.append(f"{case.described()}: {differs}")
    assert not wrong, f"{dict(wrong)}\n" + "\n".join(shown[:5])


def test_the_sample_has_every_family():
    families = Counter(row["family"] for row in HELD["cases"])
    refused = Counter(row["family"] for row in HELD["cases"] if row.get("refused"))
    assert len(families) > 80
    assert len(refused) > 12
    assert sum(refused.values()) < sum(families.values()) / 4


def test_the_encoder_takes_and_refuses_what_the_driver_does():
    answers: Counter = Counter()
    for arguments, taken in HELD["sets"]:
        ours, reason = encode_cases.accepts(arguments, 1 << 40)
        assert ours == taken, f"{arguments}: the driver {'takes' if taken else 'refuses'} it ({reason})"
        answers[taken] += 1
    assert min(answers.values()) > 100
