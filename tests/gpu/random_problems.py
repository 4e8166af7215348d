"""10,000 random problems of the family fp8_packed against float64 on the same device.

    python tests/gpu/random_problems.py [--count N] [--seed S] [--seconds S] [--only TEXT] [--json FILE]
    python tests/gpu/random_problems.py --repeat "VARIANT NUMBER SEED"

Every variant in both modes gets the same share, stratified as problem_strata.py says; operands lie in NaN as
packed_problem.py says. Problem `NUMBER` of a variant is drawn from a seed of its own, which the result file
keeps. The exit status is 0 where every problem ran and was right, and every variant met all of FACTS.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "runtime"), str(HERE)]

from packed_problem import GuardedOut, error_ratio, make_epilogue, make_problem  # noqa: E402
from problem_strata import FACTS, Spec, Tile, draw, facts  # noqa: E402
from variants import FORCED, Forced  # noqa: E402

import sm12x  # noqa: E402

COUNT = 10_000
BATCH = 200  # problems between two looks at the results
SHOWN = 20


def tile_of(each: Forced) -> Tile:
    return Tile(each.variant.token_tile, each.variant.feature_tile, each.variant.tile[2])


@dataclass
class Outcomes:
    """What is still on the device, and what was read back: for each problem the error over its bound and how
    many elements outside of the output changed."""

    waiting: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    checked: int = 0
    worst: float = 0.0
    failed: list[str] = field(default_factory=list)

    def add(self, name: str, ratio: torch.Tensor, damage: torch.Tensor) -> None:
        self.waiting.append((name, ratio, damage.to(torch.float64)))

    def read(self) -> None:
        if not self.waiting:
            return
        pairs = torch.stack([torch.stack(pair) for _, *pair in self.waiting]).cpu().numpy()
        for (name, *_), (ratio, damage) in zip(self.waiting, pairs, strict=True):
            self.checked += 1
            self.worst = max(self.worst, float(ratio))
            if not ratio <= 1.0 or damage:
                self.failed.append(
                    f"{name}: error is {ratio:.3g} of its bound, {damage:.0f} elements outside changed"
                )
        self.waiting.clear()


def run_problem(each: Forced, spec: Spec, workspace: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(error over its bound, elements changed outside of the output) of one call, on the device."""
    rng = np.random.default_rng([spec.seed, 1])
    problem = make_problem(spec.rows, spec.n, spec.k, spec.seed, pads=spec.pads)
    operands = problem.operands(spec.layout)
    epilogue = make_epilogue(
        problem, operands, spec.modes, spec.form, rng, bias=spec.bias, weighted=spec.weighted
    )
    out = GuardedOut(operands.out_rows, spec.n, spec.out, spec.out_pad, spec.out_gap)
    scratch = workspace.random_() if spec.workspace else None  # whatever it held before must not matter
    sm12x.grouped_gemm(
        operands.a,
        problem.b,
        out=out.out,
        out_dtype=spec.out,
        workspace=scratch,
        variant=each.argument,
        **operands.arguments,
        **epilogue.arguments,
    )
    ratio = error_ratio(out.rows(operands.target), epilogue, problem, spec.out)
    return ratio, out.damaged(operands.target)


def run(options: argparse.Namespace, chosen: list[Forced], seeds: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Runs the problems in turns of the variants, for as long as there is time."""
    start = time.monotonic()
    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    workspaces = [torch.empty(sm12x.workspace_size(1024), dtype=torch.uint8, device="cuda") for _ in range(2)]
    met = {each.argument: Counter[str]() for each in chosen}
    kept: dict[str, list[int]] = {each.argument: [] for each in chosen}
    outcomes = Outcomes()
    for i, seed in enumerate(seeds.tolist()):
        if i % BATCH == 0:
            outcomes.read()
            if time.monotonic() - start > options.seconds:
                break
        each, number = chosen[i % len(chosen)], i // len(chosen)
        tile = tile_of(each)
        spec = draw(tile, number, seed, sm_count)
        name = f'"{each.argument} {number} {seed}" ({spec})'
        try:
            outcomes.add(name, *run_problem(each, spec, workspaces[i % 2]))
        except Exception as error:
            outcomes.failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            if len(outcomes.failed) > SHOWN or "CUDA" in str(error):
                break  # a lost context fails everything behind it
        met[each.argument].update(facts(spec, tile, sm_count))
        kept[each.argument].append(seed)
    try:
        outcomes.read()
    except RuntimeError as error:  # the context is lost
        first = outcomes.waiting[0][0]
        outcomes.failed.append(f"not known from {first} on: {str(error).splitlines()[0][:200]}")
    missing = {name: [fact for fact in FACTS if not counts[fact]] for name, counts in met.items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0),
        "master_seed": options.seed,
        "wanted": len(seeds),
        "checked": outcomes.checked,
        "worst_error_ratio": round(outcomes.worst, 4) if np.isfinite(outcomes.worst) else "infinite",
        "failed": outcomes.failed,
        "missing": {name: absent for name, absent in missing.items() if absent},
        "least_cases_of_a_fact": min(min(counts[fact] for fact in FACTS) for counts in met.values()),
        "seconds": round(time.monotonic() - start, 1),
        "seeds": kept,
    }


def repeat(text: str) -> int:
    """One problem again, by what a failure calls it."""
    argument, number, seed = text.split()
    each = next(each for each in FORCED if each.argument == argument)
    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    spec = draw(tile_of(each), int(number), int(seed), sm_count)
    workspace = torch.empty(sm12x.workspace_size(1024), dtype=torch.uint8, device="cuda")
    ratio, damage = (float(value) for value in run_problem(each, spec, workspace))
    print(f"{argument} {spec}, rows {spec.rows.tolist()[:64]}")
    print(f"error is {ratio:.3g} of its bound, {damage:.0f} elements outside changed")
    return 0 if ratio <= 1.0 and not damage else 1


def write(result: dict[str, Any], path: Path) -> None:
    """JSON with the seeds of a variant on one line."""
    seeds = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in result["seeds"].items())
    text = json.dumps({**result, "seeds": None}, indent=1)
    path.write_text(text.replace('"seeds": null', f'"seeds": {{\n{seeds}\n }}') + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=COUNT, help=f"problems (default: {COUNT})")
    parser.add_argument("--seed", type=int, help="master seed (default: drawn)")
    parser.add_argument("--seconds", type=float, default=330, help="start no further batch after this time")
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--json", type=Path, help="result file, with every seed")
    parser.add_argument("--repeat", metavar="PROBLEM", help="one problem of an earlier run")
    options = parser.parse_args()
    if options.repeat:
        return repeat(options.repeat)
    chosen = [each for each in FORCED if options.only in each.argument]
    if not chosen:
        print(f"there is no variant of fp8_packed here whose name contains {options.only!r}")
        return 2
    if options.seed is None:
        options.seed = int(np.random.default_rng().integers(2**32))
    print(f"master seed {options.seed}", flush=True)
    seeds = np.random.default_rng(options.seed).integers(2**32, size=options.count)
    result = run(options, chosen, seeds)
    if options.json:
        write(result, options.json)
    for text in result["failed"][:SHOWN]:
        print(text)
    for name, absent in result["missing"].items():
        print(f"{name}: no problem with {', '.join(absent)}")
    print(f"each of {len(chosen)} variants met each edge {result['least_cases_of_a_fact']} times or more")
    print(
        f"{result['checked']} of {result['wanted']} problems checked, {len(result['failed'])} failed, worst "
        f"error {result['worst_error_ratio']} of its bound, master seed {options.seed}, {result['seconds']} s"
    )
    complete = result["checked"] == result["wanted"] and not result["missing"]
    return 0 if complete and not result["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
