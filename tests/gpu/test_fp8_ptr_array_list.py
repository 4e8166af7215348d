"""List calls: every group with its own shape, pointers and strides, more groups than one launch carries,
empty ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from torch_reference import (  # noqa: E402
    DTYPES,
    PoisonedOut,
    Verdicts,
    as_float64,
    error_ratio,
    in_poison,
    random_e4m3,
)
from variants import VARIANTS, Variant, key  # noqa: E402

import sm12x  # noqa: E402

SCALE_FORMS = (("float", "one"), ("vector", "vector"), ("one", "float"), ("vector", "float"))


@dataclass
class Group:
    """One group's operands on the device and its float64 reference without scales and bias."""

    a: Any
    b: Any
    product: Any
    magnitude: Any

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.a.shape[0], self.b.shape[0], self.a.shape[1]


def make_groups(count: int, tile: int, rng: np.random.Generator, generator: torch.Generator) -> list[Group]:
    groups = []
    edges = (0, 1, tile - 1, tile, tile + 1, 2 * tile + 3)
    for _ in range(count):
        m = int(rng.choice(edges)) if count < 100 else int(rng.choice((0, 1, 3, tile + 1)))
        n, k = 8 * int(rng.integers(1, 40)), 16 * int(rng.integers(1, 50 if count < 100 else 12))
        a, b = random_e4m3((m, k), generator, "cuda"), random_e4m3((n, k), generator, "cuda")
        left, right = as_float64(a), as_float64(b).T
        pad = 16 * int(rng.integers(0, 3))
        groups.append(
            Group(
                a=in_poison(a, pad).view(torch.float8_e4m3fn),
                b=in_poison(b, pad).view(torch.float8_e4m3fn),
                product=left @ right,
                magnitude=left.abs() @ right.abs(),
            )
        )
    return groups


def make_scale(form: str, length: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """(what the caller passes, the same in float64 on the device as (length,) or one value)."""
    if form == "none":
        return None, torch.ones((), dtype=torch.float64, device="cuda")
    count = length if form == "vector" else 1
    values = torch.as_tensor((rng.uniform(0.5, 1.5, count) * 2.0**-8).astype(np.float32))
    if form == "float":
        return float(values[0]), values[0].double().cuda()
    return values.cuda(), values.double().cuda()


def expected(group: Group, a_scale: Any, b_scale: Any, bias: Any) -> tuple[Any, Any]:
    factor = (a_scale[:, None] if a_scale.ndim else a_scale) * (b_scale[None, :] if b_scale.ndim else b_scale)
    reference = group.product * factor
    if bias is not None:
        reference = reference + bias.to(torch.float64)
    return reference, group.magnitude * factor.abs()


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
@pytest.mark.parametrize("count", [1, 5, 33, 340, 341, 700])
def test_every_group_has_its_own_shape(count: int, variant: Variant, seed: int) -> None:
    """Scales by value, on the device, per row and per channel; bias types; out given (guarded) or ours."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    groups = make_groups(count, variant.token_tile, rng, generator)
    verdicts = Verdicts()
    for round_, (a_form, b_form) in enumerate(SCALE_FORMS if count < 100 else SCALE_FORMS[:2]):
        a_scales = [make_scale(a_form, group.shape[0], rng) for group in groups]
        b_scales = [make_scale(b_form, group.shape[1], rng) for group in groups]
        bias_type = (None, torch.float32, torch.bfloat16, torch.float16)[(round_ + count) % 4]
        biases = None
        if bias_type is not None:
            biases = [
                torch.randn(g.shape[1], generator=generator, device="cuda").to(bias_type) for g in groups
            ]
        poisoned = [
            PoisonedOut(g.shape[0], g.shape[1], variant.out, "cuda", row_pad=8 * (round_ % 2)) for g in groups
        ]
        given = round_ != 2
        outs = sm12x.grouped_gemm(
            [g.a for g in groups],
            [g.b for g in groups],
            a_scale=[passed for passed, _ in a_scales],
            b_scale=[passed for passed, _ in b_scales],
            bias=biases,
            out=[p.out for p in poisoned] if given else None,
            out_dtype=variant.out,
            variant=variant.key,
        )
        assert len(outs) == count
        for index, group in enumerate(groups):
            assert outs[index].dtype == DTYPES[variant.out]
            bias = None if biases is None else biases[index]
            reference, magnitude = expected(group, a_scales[index][1], b_scales[index][1], bias)
            label = f"round {round_} group {index} of {count}, (M, N, K) = {group.shape}"
            damage = poisoned[index].damaged() if given else None
            verdicts.add(
                label, error_ratio(outs[index], reference, magnitude, group.shape[2], variant.out), damage
            )
    verdicts.check(seed)


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
def test_one_scale_for_all_groups(variant: Variant, seed: int) -> None:
    """a_scale and b_scale may be one value for the whole list, or absent."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    groups = make_groups(5, variant.token_tile, rng, generator)
    verdicts = Verdicts()
    for a_form, b_form in (("float", "none"), ("none", "one"), ("one", "float")):
        a_scale, a_value = make_scale(a_form, 1, rng)
        b_scale, b_value = make_scale(b_form, 1, rng)
        a_scale, b_scale = (x.reshape(()) if isinstance(x, torch.Tensor) else x for x in (a_scale, b_scale))
        # float16 cannot hold products of full-range operands with one scale of the usual size.
        shrink = 2.0**-8 if "none" in (a_form, b_form) else 1.0
        if shrink != 1.0 and isinstance(a_scale, float):
            a_scale, a_value = a_scale * shrink, a_value * shrink
        elif shrink != 1.0 and b_scale is not None:
            b_scale, b_value = b_scale * shrink, b_value * shrink
        outs = sm12x.grouped_gemm(
            [g.a for g in groups],
            [g.b for g in groups],
            a_scale=a_scale,
            b_scale=b_scale,
            out_dtype=variant.out,
            variant=variant.key,
        )
        for index, group in enumerate(groups):
            reference, magnitude = expected(group, a_value.reshape(()), b_value.reshape(()), None)
            ratio = error_ratio(outs[index], reference, magnitude, group.shape[2], variant.out)
            verdicts.add(f"{a_form} x {b_form}, group {index}", ratio)
    verdicts.check(seed)


def test_selected_variant_and_all_empty_groups(seed: int) -> None:
    """Without variant=; a list in which no group has rows launches nothing and gives empty outputs."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    groups = make_groups(12, 64, rng, generator)
    outs = sm12x.grouped_gemm([g.a for g in groups], [g.b for g in groups], a_scale=2.0**-8, b_scale=2.0**-8)
    verdicts = Verdicts()
    factor = torch.full((), 2.0**-16, dtype=torch.float64, device="cuda")
    for index, group in enumerate(groups):
        reference, magnitude = expected(group, factor, factor / factor, None)
        verdicts.add(
            f"group {index}", error_ratio(outs[index], reference, magnitude, group.shape[2], "bfloat16")
        )
    verdicts.check(seed)
    empty = [g.a[:0] for g in groups]
    outs = sm12x.grouped_gemm(empty, [g.b for g in groups])
    assert [tuple(out.shape) for out in outs] == [(0, g.shape[1]) for g in groups]
