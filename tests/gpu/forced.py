"""The names under which `variant=` forces kernels, and under which results know them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sm12x.manifest import Variant
from sm12x.validation.variants import gemm_variants


@dataclass(frozen=True)
class Forced:
    """A variant of the family fp8_packed with its mode forced: whole tiles, or split-K."""

    variant: Variant
    split: bool

    @property
    def argument(self) -> str:
        """What `variant=` takes: the key alone would leave the mode to `select`."""
        return f"{self.variant.key}:{'split' if self.split else 'whole'}"

    @property
    def name(self) -> str:
        """As results name it."""
        return f"{self.variant.key}:split" if self.split else self.variant.key

    @property
    def tile(self) -> int:
        """Rows of one tile on the token side."""
        return self.variant.token_tile


def forced(arch: str) -> list[Forced]:
    """Every variant of fp8_packed in both modes."""
    return [Forced(v, split) for v in gemm_variants(arch, "fp8_packed") for split in (False, True)]


def forced_arguments(arch: str, family: str, out: str) -> dict[str, str]:
    """What forces every variant of a family that writes `out`, by its name in results. Raises ValueError
    where there is none."""
    if family == "fp8_packed":
        found = {each.name: each.argument for each in forced(arch)}
    else:
        found = {v.key: v.key for v in gemm_variants(arch, family) if out in v.outs}
    if not found:
        raise ValueError(f"no variant of {family} for {arch} writes {out}")
    return found
