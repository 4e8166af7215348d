"""2,000 random expert layers, each stage against float64 on the same device.

    python tests/gpu/random_layers.py [--count N] [--seed S] [--seconds S] [--json FILE]
    python tests/gpu/random_layers.py --repeat "NUMBER SEED"

Stratified as layer_strata.py says; operands lie in NaN as layer_problem.py says. Two of three layers have a
kernel of either GEMM forced, drawn from all there are, whole and split; those that one launch can do are that
too, twice, against the chain of launches whose bits it must have. Checked of each layer: routing bit
for bit; scales and maxima bit for bit, codes within an e4m3 step of the exact quotient and equal to the
nearest of the float32 one; both GEMMs against float64 on what the stage before gave; the sum bit for bit; the
layer against the float64 composition at a relative Frobenius error per token of 2e-2; nothing around the
result changed. Layer `NUMBER` is drawn from a seed of its own, which the result file keeps. The exit status
is 0 where every layer ran and was right, and the run met all of FACTS and every kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "runtime"), str(HERE)]

from forced import Forced  # noqa: E402
from layer_case import Layers, run_layer  # noqa: E402
from layer_forced import downs, ups, wholes  # noqa: E402
from layer_problem import make_layer  # noqa: E402
from layer_stages import LAYER_LIMIT, LIMITS  # noqa: E402
from layer_strata import FACTS, Spec, draw, facts  # noqa: E402
from layer_whole import whole_kernel  # noqa: E402
from torch_reference import DEVICE  # noqa: E402
from variants import ARCH  # noqa: E402

COUNT = 2_000
BATCH = 50  # layers between two looks at the results
SHOWN = 20
# Of all tokens, those further from the float64 composition than LAYER_LIMIT through rows quantised anew.
REQUANTISED_SHARE = 1e-3


def forced_of(spec: Spec) -> tuple[Forced | None, Forced | None]:
    """The kernels that a layer is made to run, None for what select chooses."""
    known = ups(ARCH, spec.gated), downs(ARCH, spec.static2 is not None)
    first, second = (
        each[int(at * len(each))] if at < 1.0 else None for at, each in zip(spec.pick, known, strict=True)
    )
    return first, second


def kernel_facts() -> dict[str, int]:
    """Every kernel that a run has to meet."""
    every = [each for gated in (True, False) for each in ups(ARCH, gated)] + downs(ARCH, False)
    keys = [each.name for each in every] + [variant.key for variant in wholes(ARCH).values()]
    return {f"kernel {key}": 0 for key in keys}


def run(options: argparse.Namespace, seeds: list[int]) -> dict[str, Any]:
    """Runs the layers for as long as there is time."""
    start = time.monotonic()
    met = Counter[str]()
    kept: list[int] = []
    outcomes = Layers()
    for number, seed in enumerate(seeds):
        if number % BATCH == 0:
            outcomes.read()
            if time.monotonic() - start > options.seconds:
                break
        spec = draw(number, seed)
        name = f'"{number} {seed}"'
        up, down = forced_of(spec)
        label = f"{name} up={up and up.name} down={down and down.name} ({spec})"
        try:
            outcomes.add(label, run_layer(make_layer(spec), up, down, True), spec.tokens)
        except Exception as error:
            outcomes.failed.append(f"{label}: {type(error).__name__}: {str(error)[:300]}")
            if len(outcomes.failed) > SHOWN or "CUDA" in str(error):
                break  # a lost context fails everything behind it
        met.update(facts(spec))
        if spec.tokens:
            met.update(f"kernel {each.name}" for each in (up, down) if each is not None)
            whole = whole_kernel(spec)
            met.update([] if whole is None else [f"kernel {whole.key}"])
        kept.append(seed)
    try:
        outcomes.read()
    except RuntimeError as error:  # the context is lost
        first = outcomes.waiting[0][0]
        outcomes.failed.append(f"not known from {first} on: {str(error).splitlines()[0][:200]}")
    wanted = (*FACTS, *kernel_facts())
    if outcomes.requantised > REQUANTISED_SHARE * max(outcomes.tokens, 1000):
        outcomes.failed.append(
            f"{outcomes.requantised} of {outcomes.tokens} tokens are further than {LAYER_LIMIT} from the "
            "float64 composition, more than rows that were quantised anew explain"
        )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0) if DEVICE == "cuda" else "emulator",
        "master_seed": options.seed,
        "wanted": len(seeds),
        "checked": outcomes.checked,
        "tokens": outcomes.tokens,
        "tokens_requantised": outcomes.requantised,
        "worst": {
            name: round(value, 4) if np.isfinite(value) else "infinite"
            for name, value in outcomes.worst.items()
        },
        "limits": LIMITS,
        "failed": outcomes.failed,
        "missing": [name for name in wanted if not met[name]],
        "least_layers_of_a_fact": min(met[name] for name in wanted),
        "seconds": round(time.monotonic() - start, 1),
        "seeds": kept,
    }


def repeat(text: str) -> int:
    """One layer again, by what a failure calls it."""
    number, seed = map(int, text.split())
    spec = draw(number, seed)
    up, down = forced_of(spec)
    print(f"up={up and up.name} down={down and down.name} {spec}")
    problem = make_layer(spec)
    print(f"rows of experts {problem.rows.tolist()[:64]}, arguments {sorted(problem.arguments)}")
    found = {name: float(value) for name, value in run_layer(problem, up, down, True).items()}
    for name, value in found.items():
        limit = LIMITS.get(name)
        print(f"{name:<12} {value:10.4g}" + (f"  (limit {limit:g})" if limit is not None else ""))
    return 0 if all(found[name] <= limit for name, limit in LIMITS.items()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=COUNT, help=f"layers (default: {COUNT})")
    parser.add_argument("--seed", type=int, help="master seed (default: drawn)")
    parser.add_argument("--seconds", type=float, default=240, help="start no further batch after this time")
    parser.add_argument("--json", type=Path, help="result file, with every seed")
    parser.add_argument("--repeat", metavar="LAYER", help="one layer of an earlier run")
    options = parser.parse_args()
    if options.repeat:
        return repeat(options.repeat)
    if options.seed is None:
        options.seed = int(np.random.default_rng().integers(2**32))
    print(f"master seed {options.seed}", flush=True)
    seeds = np.random.default_rng(options.seed).integers(2**32, size=options.count).tolist()
    result = run(options, seeds)
    if options.json:
        text = json.dumps({**result, "seeds": None}, indent=1)
        seeds_text = f'"seeds": {json.dumps(result["seeds"])}'
        options.json.write_text(text.replace('"seeds": null', seeds_text) + "\n", encoding="utf-8")
    for text in result["failed"][:SHOWN]:
        print(text)
    if result["missing"]:
        print(f"no layer with {', '.join(result['missing'])}")
    print(f"every kernel and every fact was met {result['least_layers_of_a_fact']} times or more")
    print(f"worst: {', '.join(f'{name} {value}' for name, value in result['worst'].items())}")
    print(
        f"{result['tokens_requantised']} of {result['tokens']} tokens past {LAYER_LIMIT:g} of the float64 "
        "composition through rows quantised anew"
    )
    print(
        f"{result['checked']} of {result['wanted']} layers checked, {len(result['failed'])} failed, master "
        f"seed {options.seed}, {result['seconds']} s"
    )
    complete = result["checked"] == result["wanted"] and not result["missing"]
    return 0 if complete and not result["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
