"""Expert layers and their calls on fake tensors, shared by the tests of the launch path."""

from __future__ import annotations

from dataclasses import replace

import sm12x
from sm12x.ops import moe_plan
from sm12x.select.layer import LayerChoice, select_layer

E, H, INNER, T, TOP = 6, 64, 48, 5, 2
STREAM = 0x7F12_3456_7890
CALL = ("x", "topk_weights", "topk_ids")


def weights(fake, experts=E, hidden=H, inner=INNER, **more):
    """A layer's arguments; `more` adds or replaces some."""
    rows = 2 * inner if more.get("gated", True) else inner
    return {
        "w1": fake.tensor((experts, rows, hidden), "float8_e4m3fn"),
        "w2": fake.tensor((experts, hidden, inner), "float8_e4m3fn"),
        **more,
    }


def tokens(fake, count=T, top_k=TOP, hidden=H, dtype="bfloat16", ids="int32", **more):
    """What a call brings, with `out`."""
    return {
        "x": fake.tensor((count, hidden), dtype),
        "topk_weights": fake.tensor((count, top_k), "float32"),
        "topk_ids": fake.tensor((count, top_k), ids),
        "out": fake.tensor((count, hidden), dtype),
        **more,
    }


def make(given):
    return sm12x.FusedMoE(**given)


def run(layer, call):
    """Call a FusedMoE."""
    return layer(*(call[name] for name in CALL), **{k: v for k, v in call.items() if k not in CALL})


def run_function(given, call):
    """The same by the function."""
    rest = {k: v for k, v in call.items() if k not in CALL}
    weights_ = {k: v for k, v in given.items() if k not in ("w1", "w2")}
    return sm12x.fused_moe(
        call["x"], given["w1"], given["w2"], call["topk_weights"], call["topk_ids"], **weights_, **rest
    )


# Every activation, and what may be given with it.
ACTIVATIONS = (
    {},
    {"activation": "gelu"},
    {"activation": "gelu_tanh"},
    {"activation": "relu2"},
    {"activation": "silu", "limit": 3.5},
    {"activation": "swigluoai"},
    {"activation": "swigluoai", "alpha": 1.25, "beta": 0.5, "limit": 2.5},
    {"activation": "swigluoai_uninterleave", "alpha": 2.0},
)


def force(monkeypatch, *, up=None, down=None, up_units=0, down_units=0):
    """Have layers run these variants, by key; `down` of the family fp8_packed quantises apart."""

    def forced(problem, held, sms):
        choice, lists = select_layer(problem, held, sms)
        first, second, apart = choice.up, choice.down, choice.quantises_apart
        if up is not None:
            first = replace(first, variant=held.variants[up])
        if down is not None:
            second = replace(second, variant=held.variants[down])
            apart = second.variant.role == "gemm" and not problem.static
        first, second = replace(first, least_units=up_units), replace(second, least_units=down_units)
        return LayerChoice(first, second, apart), lists

    monkeypatch.setattr(moe_plan, "select_layer", forced)


def keys(fake):
    """What was launched, without the prefix of symbols."""
    return [each.symbol.removeprefix("sm12x_") for each in fake.launches]


def base_of(fake):
    """Where the last call of four launches has its workspace."""
    return fake.launches[-4].params.tokens.q


def nothing_happened(fake):
    """Whether nothing was launched or allocated."""
    return fake.launches == [] and fake.allocated == {}
