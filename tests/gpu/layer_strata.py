"""Random expert layers, drawn so that a run meets every kind of layer and every edge of the kernels' tiles.

A stratum is a class of expert counts, a class of token counts and an activation; layer number i is of stratum
i * STEP % STRATA. Within it everything is random. Needs no torch, so that unit tests can look at what is
drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "swigluoai_uninterleave")
KINDS = (*((name, True) for name in ACTIVATIONS), *((name, False) for name in ACTIVATIONS[:4]))
EXPERTS = ((1, 1), (2, 32), (33, 128), (129, 512))
TOKENS = ((0, 1), (2, 8), (9, 64), (65, 400))
STRATA = tuple(product(EXPERTS, TOKENS, KINDS))
STEP = 47  # no divisor in common with them: neighbours differ in everything
ROUTINGS = ("distinct", "skewed", "any", "invalid", "one expert", "nobody")
WEIGHT_SCALES = ("none", "value", "expert", "channel")
STATIC = (None, "float", "array")
BIASES = (None, "float32", "bfloat16", "float16")
DTYPES = ("bfloat16", "float16")
BLOCK = 16  # H and I are multiples of it
TILE_K = 128
K_CLASSES = ("one block", "all but one block", "half", "whole", "other")
MOST_WEIGHTS = 1 << 24  # bytes of w1 and w2
MANY_TOKENS = 5000  # of a few layers: more routes than one CTA sorts


@dataclass(frozen=True)
class Spec:
    """A layer but for its data, which `seed` gives. `global_experts` 0: no expert_map. `static1`, `static2`:
    how a1_scale and a2_scale are given, None for dynamic ones. `pads`: elements behind rows of x, bytes
    behind rows of w1 and of w2, rows behind an expert of either; `out_pad`: elements behind rows of out.
    `plan`: called through `FusedMoE`. `pick`: which forced kernels, in [0, 1); 1 or more for none."""

    stratum: int
    seed: int
    tokens: int
    top_k: int
    experts: int
    global_experts: int
    hidden: int
    intermediate: int
    activation: str
    gated: bool
    alpha: float | None
    beta: float | None
    limit: float | None
    dtype: str
    routing: str
    w1_scale: str
    w2_scale: str
    static1: str | None
    static2: str | None
    bias1: str | None
    bias2: str | None
    weight_on_input: bool
    wide_ids: bool
    pads: tuple[int, int, int, int]
    out_pad: int
    form: int
    workspace: bool
    plan: bool
    pick: tuple[float, float]

    def __str__(self) -> str:
        words = [
            f"T={self.tokens} k={self.top_k} E={self.experts}/{self.global_experts} H={self.hidden} "
            f"I={self.intermediate} {self.activation}{'' if self.gated else ' not gated'} {self.dtype} "
            f"{self.routing} scales {self.w1_scale} {self.w2_scale}",
            *(f"{name}={getattr(self, name)}" for name in ("alpha", "beta", "limit", "static1", "static2"))
        ]  # fmt: skip
        words += [f"{name}={getattr(self, name)}" for name in ("bias1", "bias2", "pads", "out_pad", "form")]
        flags = ("weight_on_input", "wide_ids", "workspace", "plan")
        words += [name for name in flags if getattr(self, name)]
        return " ".join(word for word in words if not word.endswith("=None")) + f" seed={self.seed}"


def make_spec(**changes: Any) -> Spec:
    """A plain layer with what a test wants of it."""
    known: dict[str, Any] = {
        **{"stratum": -1, "seed": 0, "tokens": 5, "top_k": 2, "experts": 4, "global_experts": 0},
        **{"hidden": 96, "intermediate": 80, "activation": "silu", "gated": True},
        **{"alpha": None, "beta": None, "limit": None, "dtype": "bfloat16", "routing": "distinct"},
        **{"w1_scale": "channel", "w2_scale": "channel", "static1": None, "static2": None},
        **{"bias1": None, "bias2": None, "weight_on_input": False, "wide_ids": False},
        **{"pads": (0, 0, 0, 0), "out_pad": 0, "form": 0, "workspace": True, "plan": False},
        "pick": (1.0, 1.0),
    }
    assert set(known) == {each.name for each in fields(Spec)}
    return Spec(**{**known, **changes})


def draw(number: int, seed: int) -> Spec:
    """Layer `number` of a run."""
    rng = np.random.default_rng(seed)

    def one_of(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    stratum = number * STEP % len(STRATA)
    (least, most), (fewest, largest), (activation, gated) = STRATA[stratum]
    experts = most if rng.random() < 0.1 else int(rng.integers(least, most + 1))
    many = largest == TOKENS[-1][1] and rng.random() < 0.08
    tokens = MANY_TOKENS if many else int(rng.integers(fewest, largest + 1))
    on_input = rng.random() < 0.1
    top_k = 1 if on_input else int(rng.integers(1, 9)) if not many else int(rng.integers(2, 5))
    mapped = rng.random() < 0.3
    swiglu = activation.startswith("swigluoai")
    limited = swiglu or activation == "silu"
    hidden, intermediate = _sizes(experts, 3 if gated else 2, many, rng)
    return Spec(
        stratum=stratum,
        seed=seed,
        tokens=tokens,
        top_k=top_k,
        experts=experts,
        global_experts=experts + int(rng.integers(0, 2 * experts + 3)) if mapped else 0,
        hidden=hidden,
        intermediate=intermediate,
        activation=activation,
        gated=gated,
        alpha=float(rng.uniform(0.5, 2.0)) if swiglu and rng.random() < 0.5 else None,
        beta=float(rng.uniform(-0.5, 1.5)) if swiglu and rng.random() < 0.5 else None,
        limit=float(rng.uniform(0.5, 3.0)) if limited and rng.random() < 0.4 else None,
        dtype=one_of(DTYPES),
        routing="one expert" if rng.random() < 0.05 else str(rng.choice(ROUTINGS, p=_ROUTING_CHANCES)),
        w1_scale=str(rng.choice(WEIGHT_SCALES, p=(0.1, 0.15, 0.25, 0.5))),
        w2_scale=str(rng.choice(WEIGHT_SCALES, p=(0.1, 0.15, 0.25, 0.5))),
        static1=one_of(STATIC) if rng.random() < 0.4 else None,
        static2=one_of(STATIC) if rng.random() < 0.4 else None,
        bias1=one_of(BIASES) if rng.random() < 0.6 else None,
        bias2=one_of(BIASES) if rng.random() < 0.6 else None,
        weight_on_input=on_input,
        wide_ids=rng.random() < 0.5,
        pads=(8 * int(rng.integers(3)), *(16 * int(rng.integers(2)) for _ in range(2)), int(rng.integers(3))),
        out_pad=8 * int(rng.integers(3)),
        form=int(rng.integers(1 << 16)),
        workspace=rng.random() < 0.95,
        plan=rng.random() < 0.5,
        pick=tuple(float(rng.random()) if rng.random() < 0.7 else 1.0 for _ in range(2)),  # type: ignore[arg-type]
    )


_ROUTING_CHANCES = (0.4, 0.2, 0.15, 0.2, 0.03, 0.02)


def _sizes(experts: int, matrices: int, many: bool, rng: np.random.Generator) -> tuple[int, int]:
    """H and I, each of any class against the tiles' K, as large as the weights may be."""

    def size(most: int) -> int:
        blocks = TILE_K // BLOCK
        tail = {
            "one block": 1,
            "all but one block": blocks - 1,
            "half": blocks // 2,
            "whole": 0,
            "other": int(rng.integers(1, blocks)),
        }[str(rng.choice(K_CLASSES))]
        tiles = int(rng.integers(0, int(rng.choice((1, 3, 12))) + 1))
        blocks = min(tail + tiles * blocks or blocks, max(1, most // BLOCK))
        return BLOCK * blocks

    area = MOST_WEIGHTS // (experts * matrices)
    if many:
        area = min(area, 1 << 16)
    first = size(min(2048, area // BLOCK))
    second = size(min(2048, area // first))
    return (first, second) if rng.random() < 0.5 else (second, first)


def draw_ids(spec: Spec, rng: np.random.Generator) -> NDArray[np.int64]:
    """topk_ids (T, k), numbers of all devices' experts where there is a map."""
    shape = spec.tokens, spec.top_k
    everywhere = spec.global_experts or spec.experts
    if spec.routing == "distinct" and spec.top_k <= everywhere:
        return np.argsort(rng.random((spec.tokens, everywhere)), axis=1)[:, : spec.top_k]
    if spec.routing == "skewed":
        share = rng.dirichlet(np.full(everywhere, 0.3))
        return rng.choice(everywhere, shape, p=share)
    if spec.routing == "one expert":
        return np.full(shape, int(rng.integers(everywhere)))
    ids = rng.integers(0, everywhere, shape)
    if spec.routing in ("invalid", "nobody"):
        outside = np.array([-1, -1, -1, everywhere, everywhere + 7, -(2**31), 2**31 - 1])
        if spec.wide_ids:
            outside = np.append(outside, [2**32, 2**32 + 1, -(2**40)])
        ids = np.where(
            rng.random(shape) < (0.3 if spec.routing == "invalid" else 2), rng.choice(outside, shape), ids
        )
    return ids


def draw_map(spec: Spec, rng: np.random.Generator) -> NDArray[np.int32] | None:
    """expert_map (E_global,): every expert of this device is somewhere, the others are elsewhere."""
    if not spec.global_experts:
        return None
    found = np.where(rng.random(spec.global_experts) < 0.9, -1, spec.experts + 3).astype(np.int32)
    found[rng.permutation(spec.global_experts)[: spec.experts]] = rng.permutation(spec.experts)
    return found


def facts(spec: Spec) -> set[str]:
    """What a layer is a case of; a run has to have every fact of FACTS."""
    kind = f"{spec.activation}{'' if spec.gated else ', not gated'}"
    found = {
        *(kind, spec.dtype, f"routing {spec.routing}"),
        *(f"w1_scale {spec.w1_scale}", f"w2_scale {spec.w2_scale}"),
        *(f"a1_scale {spec.static1}", f"a2_scale {spec.static2}"),
        *(f"bias1 {spec.bias1}", f"bias2 {spec.bias2}"),
    }
    tests = {
        "no tokens": spec.tokens == 0,
        "one token": spec.tokens == 1,
        "two launches of route": spec.tokens * spec.top_k > 8192,
        "routes that the first GEMM counts": 0 < spec.tokens * spec.top_k <= 512,
        "more than it counts": spec.tokens * spec.top_k > 512,
        "one expert in all": spec.experts == 1,
        "512 experts": spec.experts == 512,
        "more than 128 experts": spec.experts > 128,
        "an expert map": spec.global_experts > 0,
        "weights on the input": spec.weight_on_input,
        "ids of 64 bits": spec.wide_ids,
        "a workspace of ours": not spec.workspace,
        "a plan object": spec.plan,
        "a limit of silu": spec.activation == "silu" and spec.limit is not None,
        "both scales static": spec.static1 is not None and spec.static2 is not None,
        "neither scale static": spec.static1 is None and spec.static2 is None,
        "H one block past a tile": spec.hidden % TILE_K == BLOCK,
        "I one block past a tile": spec.intermediate % TILE_K == BLOCK,
        "I of one block": spec.intermediate == BLOCK,
        "H whole tiles": spec.hidden % TILE_K == 0,
        "I whole tiles": spec.intermediate % TILE_K == 0,
        "H and I of several tiles": spec.hidden > TILE_K and spec.intermediate > TILE_K,
    }
    return found | {name for name, is_so in tests.items() if is_so}


FACTS = (
    *(f"{name}{'' if gated else ', not gated'}" for name, gated in KINDS),
    *DTYPES,
    *(f"routing {each}" for each in ROUTINGS),
    *(f"{name} {mode}" for name in ("w1_scale", "w2_scale") for mode in WEIGHT_SCALES),
    *(f"{name} {mode}" for name in ("a1_scale", "a2_scale") for mode in STATIC),
    *(f"{name} {mode}" for name in ("bias1", "bias2") for mode in BIASES),
    *("no tokens", "one token", "two launches of route", "one expert in all", "512 experts"),
    *("routes that the first GEMM counts", "more than it counts"),
    *("more than 128 experts", "an expert map", "weights on the input", "ids of 64 bits"),
    *("a workspace of ours", "a plan object", "a limit of silu", "both scales static"),
    *("neither scale static", "H one block past a tile", "I one block past a tile", "I of one block"),
    *("H whole tiles", "I whole tiles", "H and I of several tiles"),
)
