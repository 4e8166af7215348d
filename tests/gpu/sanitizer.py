"""compute-sanitizer on sanitizer_case.py: what it reports, reduced to signatures; of fp8_ptr_array compared
with the ledger.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck", "synccheck")
FAMILIES = ("fp8_ptr_array", "fp8_packed", "layer")
LEDGER = HERE / "sanitizer_ledger.json"
_STARTS = re.compile(
    r"^========= (?:(?:Error|Warning|Info): )?"
    r"(Race reported|Potential|Invalid|Barrier error|Divergent|Program hit|Uninitialized|Missing|Illegal|"
    r"Misaligned|Leaked)"
)


def signatures(text: str) -> Counter[str]:
    """The reports in a tool's output, one string each: its first lines with addresses, numbers and hosts
    removed.
    """
    found: Counter[str] = Counter()
    lines = text.splitlines()
    for index, line in enumerate(lines):
        if not _STARTS.match(line):
            continue
        block = [line]
        for following in lines[index + 1 : index + 6]:
            if not following.startswith("=========     ") or "Saved host backtrace" in following:
                break
            block.append(following)
        message = " | ".join(part.removeprefix("=========").strip() for part in block)
        message = re.sub(r"0x[0-9a-fA-F]+", "#", message)
        message = re.sub(r"\(\d+,\d+,\d+\)", "(#)", message)
        found[re.sub(r"\b\d+\b", "#", message)] += 1
    return found


def without_kernel(signature: str) -> str:
    """A signature that can be compared between kernels of different names."""
    return re.sub(r"\b(?:at|in) [^|]*?(?=\+#|\||$)", "at kernel", signature)


def unexplained(found: Counter[str], ledger: list[dict[str, str]], baseline: Counter[str]) -> list[str]:
    """Signatures that neither a ledger entry nor the baseline has."""
    like = {without_kernel(signature) for signature in baseline}
    return [
        signature
        for signature in found
        if not any(re.search(entry["pattern"], signature) for entry in ledger)
        and without_kernel(signature) not in like
    ]


def run_tool(
    tool: str, family: str, logs: Path, budget: float, environment: dict[str, str], baselines: list[str]
) -> tuple[bool, float, str, list[str]]:
    """(passed, seconds, summary, failures) of one tool on the cases of one family. The ledger and baselines
    are for fp8_ptr_array; of fp8_packed and of layers, whose kernels are ours, nothing may be reported."""
    start = time.monotonic()
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return False, 0.0, "compute-sanitizer not found", []
    case = [sys.executable, str(HERE / "sanitizer_case.py"), "--family", family]
    if tool != "memcheck":
        case.append("--quick")
    found, status, text = _run(program, tool, case, budget, environment)
    (logs / f"sanitizer-{family}-{tool}.log").write_text(text, encoding="utf-8")
    known: Counter[str] = Counter()
    may_report = family == "fp8_ptr_array"
    for index, baseline in enumerate(baselines if found and may_report else []):
        more, _, other = _run(program, tool, [baseline], budget, environment)
        known += more
        (logs / f"sanitizer-{tool}-baseline{index}.log").write_text(other, encoding="utf-8")
    ledger = json.loads(LEDGER.read_text(encoding="utf-8"))[tool] if may_report else []
    bad = unexplained(found, ledger, known)
    total = sum(found.values())
    known_kinds = f", {len(bad)} kinds not in the ledger" if may_report else ""
    summary = f"{total} reports of {len(found)} kinds{known_kinds}; exit status {status}"
    ended = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if ended:
        summary += f"; {ended[1]}"
    failures = [f"{found[signature]} x {signature[:500]}" for signature in bad]
    if status != 0 or ended is None:
        failures.append("the program did not end well: " + " / ".join(text.splitlines()[-6:])[-800:])
    return status == 0 and ended is not None and not bad, time.monotonic() - start, summary, failures


def _run(
    program: str, tool: str, case: list[str], budget: float, environment: dict[str, str]
) -> tuple[Counter[str], int | None, str]:
    # Without --error-exitcode the status is the program's own: reports are judged by the ledger.
    command = [program, "--tool", tool, "--print-limit", "200", *case]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=budget, env=environment, cwd=HERE.parents[1]
        )
    except subprocess.TimeoutExpired as ended:
        text = (
            ended.stdout.decode(errors="replace") if isinstance(ended.stdout, bytes) else ended.stdout or ""
        )
        return signatures(text), None, text + "\nended after its time"
    text = done.stdout + done.stderr
    return signatures(text), done.returncode, text
