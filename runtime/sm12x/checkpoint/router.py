"""A layer's router: which experts a token goes to, and with which weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Router:
    """The tensors of a layer's router, float32, and what is done with them.

    weight: (E, H). scale: (H,), multiplies its normalised input, with H^-0.5; per_expert_scale: (E,),
    multiplies the weights of the chosen experts; None where the model has none.
    renormalize: the weights of a token's chosen experts are divided by their sum.
    norm_eps: the input is divided by its root mean square first, this below the root; None where it is not.
    """

    weight: Any
    scale: Any
    per_expert_scale: Any
    renormalize: bool
    norm_eps: float | None


def softmax_top_k(
    x: NDArray[Any], router: Router, top_k: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Route hidden states `x` (T, H), any float type, by a router with NumPy arrays, in float32.

    Returns topk_weights (T, k) float32 and topk_ids (T, k) int32, as `sm12x.fused_moe` takes them, each
    token's experts from the most probable on; of equal ones the lower id goes first. Raises ValueError
    naming `x` or `top_k`.
    """
    experts, hidden = router.weight.shape
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x: expected shape (T, {hidden}), got {x.shape}")
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts} (the number of experts), got {top_k}")
    values = x.astype(np.float32)
    if router.norm_eps is not None:
        values /= np.sqrt(np.mean(values * values, axis=1, keepdims=True) + np.float32(router.norm_eps))
    if router.scale is not None:
        values *= router.scale * np.float32(hidden**-0.5)
    logits = values @ router.weight.T
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    weights = np.take_along_axis(probabilities, ids, axis=1)
    if router.renormalize:
        weights /= weights.sum(axis=1, keepdims=True)
    if router.per_expert_scale is not None:
        weights *= router.per_expert_scale[ids]
    return weights.astype(np.float32), ids
