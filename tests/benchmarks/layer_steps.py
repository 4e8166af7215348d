"""The launches of a layer one by one, and layers with forced kernels: what `select`'s constants are made
from.

A step alone reads what a whole call left in the workspace before; launched again and again it does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layer_batch import Call, LayerBatch

from sm12x import driver
from sm12x.ops.fused_moe import take_call_arrays
from sm12x.validation import shapes


def chain_of(layer: Any, batch: LayerBatch, workspace: Any, stream: int) -> tuple[Any, Any, Any]:
    """The prepared launches of a call that ran before, as a graph gets them, its addresses, and where its
    workspace begins."""
    plan = layer._plan
    _, given, _ = take_call_arrays(batch.x, batch.topk_weights, batch.topk_ids, batch.out, workspace, stream)
    calls = plan.take(given)
    chain = calls.chains[-1].in_graphs or calls.chains[-1]
    addresses = given.x.ptr, given.topk_weights.ptr, given.topk_ids.ptr, given.out.ptr
    return chain, addresses, plan.base_in(given.workspace.ptr, calls, addresses, chain.needed)


def step_names(layer: Any, batch: LayerBatch, workspace: Any, stream: int) -> list[str]:
    """Keys of the launches of a layer, in order."""
    chain, _, _ = chain_of(layer, batch, workspace, stream)
    return [step.key for step in chain.steps]


def step_calls(
    batches: Sequence[LayerBatch], layers: Sequence[Any], workspaces: Sequence[Any], stream: int, index: int
) -> list[Call]:
    """Launch number `index` alone, for each turn of the rotation. Whole calls of all turns must have run."""

    def one(r: int, s: int) -> Call:
        batch = batches[r]
        chain, addresses, base = chain_of(layers[s], batch, workspaces[r], stream)

        def call() -> None:
            steps = chain.steps
            chain.steps = [steps[index]]
            chain._base = chain._stream = -1
            try:
                with driver.current(layers[s]._plan.device):
                    chain.run(stream, base, *addresses)
            finally:
                chain.steps = steps
                chain._base = chain._stream = -1

        return call

    return [one(r, s) for r, s in shapes.rotation(len(layers))]
