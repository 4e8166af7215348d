"""The plan of an expert layer: everything that does not change from call to call, worked out once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import driver, manifest
from ..arrays import Array
from ..driver import EMULATED
from ..select.layer import LayerProblem, select_layer
from . import launch, moe_validate, validate
from .memory import (
    WORKSPACE_ALIGNMENT,
    check_alignment,
    check_overlap,
    check_present,
    check_workspace,
    workspace_base,
)
from .moe_chain import make_chain, most_partials
from .moe_launches import Chain
from .moe_validate import Call, CallArrays, Layer, LayerArrays, LayerOptions
from .moe_whole import make_whole
from .moe_workspace import lay_out
from .row_layout import whole
from .scratch import block_of
from .torch_call import Guard
from .validate import Matrix

MOST_CALLS = 256  # numbers of tokens, and the like, that a layer keeps launches for


@dataclass(slots=True)
class CallPlan:
    """Calls of one shape. `hand_over`: an array is JAX's, for `tensors.deliver`. `chains`: prepared launches
    that no call is using; each thread takes one."""

    call: Call
    problem: LayerProblem
    device: driver.Device
    ids_mask: int
    span_x: int
    span_out: int
    hand_over: bool = False
    chains: list[Chain] = field(default_factory=list)


class LayerPlan:
    """A validated layer on its device. Holds addresses, but keeps no array alive. `known`: calls on torch
    tensors that a guard knows again (torch_layer_call.py): it, the plan, what gives the current stream."""

    __slots__ = ("_calls", "_matrices", "_spans", "device", "known", "layer", "weights")

    def __init__(self, weights: LayerArrays, options: LayerOptions) -> None:
        """Raises as `sm12x.fused_moe` says."""
        self.layer: Layer = moe_validate.take_layer(weights, options)
        ordinal = validate.same_device(weights.named())
        self.device = driver.get_device(ordinal)
        _check_weights(weights, self.layer)
        # Without owners: a plan is kept for layers that may be gone.
        self.weights = LayerArrays(*(_ownerless(each) for each in weights))
        self._matrices = _matrices(weights, self.layer)
        self._spans = tuple((address, address + matrix.span) for _, address, matrix in self._matrices)
        self._calls: dict[Any, CallPlan] = {}
        self.known: dict[Any, tuple[tuple[Guard, CallPlan, Callable[[int], int]], ...]] = {}

    def take(self, given: CallArrays) -> CallPlan:
        """The plan for calls like this one. Raises as `sm12x.fused_moe` says."""
        # Spelled out, because this runs on every call. All that a plan depends on, and the framework.
        x, weights, ids, out, workspace = given
        key = (
            *(x[1:6], weights[1:6], ids[1:6]),
            None if out is None else out[1:6],
            None if workspace is None else workspace[1:6],
        )
        try:
            return self._calls[key]
        except KeyError:
            pass
        call = moe_validate.take_call(self.layer, given, self.weights.expert_map)
        ordinal = validate.same_device(given.named())
        if ordinal != self.device.ordinal:
            raise ValueError(
                f"x: expected memory of CUDA device {self.device.ordinal}, where w1 is, got {ordinal}"
            )
        plan = CallPlan(
            call=call,
            problem=self._problem(call),
            device=self.device,
            ids_mask=7 if call.routes.wide_ids else 3,
            span_x=call.x.span,
            span_out=call.out.span,
            hand_over=any(
                array is not None and array.framework == "jax"
                for _, array in (*given.named(), *self.weights.named())
            ),
        )
        if len(self._calls) >= MOST_CALLS:
            self._calls.clear()
            self.known.clear()  # or it would keep what goes here
        self._calls[key] = plan
        return plan

    def run(self, plan: CallPlan, given: CallArrays, out: Array, stream: int) -> None:
        """Check addresses and launch. Raises as `sm12x.fused_moe` says."""
        addresses = given.x.ptr, given.topk_weights.ptr, given.topk_ids.ptr, out.ptr
        if out.readonly or not self.looks_right(plan, *addresses):
            self._check(plan, given, out)
        if not plan.call.routes.tokens:
            return
        workspace = None
        if given.workspace is not None:
            validate.writable(given.workspace, "workspace")
            workspace = given.workspace.ptr
        self.launch(plan, stream, addresses, workspace)

    def launch(
        self, plan: CallPlan, stream: int, addresses: tuple[int, int, int, int], workspace: int | None
    ) -> None:
        """Launch a call of at least one token with the addresses of x, topk_weights, topk_ids and out, which
        look right, and of the caller's workspace. Raises as `sm12x.fused_moe` says of that."""
        driver.get_device(self.device.ordinal)  # refuses a process that was forked off the layer's
        try:
            chain = plan.chains.pop()
        except IndexError:
            chain = self._chain(plan)
        try:
            if chain.context_is_current():
                self._launch(plan, chain, stream, addresses, workspace)
            else:
                with driver.current(self.device):
                    self._launch(plan, chain, stream, addresses, workspace)
        finally:
            plan.chains.append(chain)

    def _launch(
        self,
        plan: CallPlan,
        chain: Chain,
        stream: int,
        addresses: tuple[int, int, int, int],
        workspace: int | None,
    ) -> None:
        capturing = False
        if workspace is None or chain.in_graphs is not None:
            capturing = driver.stream_is_capturing(self.device, stream)
            if capturing:
                chain = chain.in_graphs or chain  # each thread has its own pair
        if workspace is not None:
            chain.run(stream, self.base_in(workspace, plan, addresses, chain.needed), *addresses)
            return
        block = None
        # In the emulator, memory that was never used shows what reads it.
        if not capturing and self.device.ordinal < EMULATED:
            block = block_of(self.device, stream, chain.needed)
        if block is None:
            with driver.temporary(self.device, chain.needed, stream) as base:
                chain.run(stream, base, *addresses)
            return
        with block.lock:
            chain.run(stream, block.address, *addresses)

    def workspace_size(self, tokens: int, top_k: int, dtype: str) -> int:
        """Bytes of workspace that are enough for calls of up to so many tokens, whatever kernels run: what
        several launches need, of which a launch for all of the layer has a part."""
        layer = self.layer
        if not tokens:
            return 0
        routes = moe_validate.Routes(tokens, top_k, layer.experts, layer.global_experts, True, True)
        rows = Matrix(tokens, layer.hidden, layer.hidden, validate.itemsize(dtype))
        partials = most_partials(self.device)
        call = Call(dtype, routes, rows, rows, None)
        return lay_out(layer, call, quantises_apart=layer.a2_scale_mode is None, partials=partials).size

    def _problem(self, call: Call) -> LayerProblem:
        layer, rows = self.layer, call.routes.most_rows
        expected = rows
        if layer.global_experts > layer.experts:  # the others' routes have no rows here
            expected = -(-rows * layer.experts // layer.global_experts)
        return LayerProblem(
            experts=layer.experts,
            hidden=layer.hidden,
            intermediate=layer.intermediate,
            gated=layer.activation.gated,
            static=layer.a2_scale_mode is not None,
            dtype=call.dtype,
            arch=self.device.arch,
            rows=rows,
            expected_rows=expected,
            weighted=not layer.weight_on_input,
            static_input=layer.a1_scale_mode is not None,
        )

    def _chain(self, plan: CallPlan) -> Chain:
        choice, lists = select_layer(plan.problem, manifest.default(), self.device.sm_count)
        if launch.LOG_SELECT:
            print("\n".join(lists), file=sys.stderr)
        given = self.device, self.layer, self.weights, plan.call, plan.problem
        if choice.whole is not None:
            chain = make_whole(*given, choice.whole)
            if choice.several_in_graphs:
                chain.in_graphs = make_chain(*given, choice)
            return chain
        if launch.LOG_SELECT:
            apart = "a launch of their own" if choice.quantises_apart else "no launch of their own"
            print(f"sm12x select: rows of the second GEMM: {apart}", file=sys.stderr)
        return make_chain(*given, choice)

    def looks_right(self, plan: CallPlan, x: int, weights: int, ids: int, to: int) -> bool:
        """Whether a call's addresses show no sign of trouble; `_check` says which there is."""
        end = to + plan.span_out
        (w1, w1_end), (w2, w2_end) = self._spans
        return bool(
            not ((x | to) & 15 or weights & 3 or ids & plan.ids_mask)
            and x
            and to
            and weights
            and ids
            and (to >= x + plan.span_x or x >= end)
            and (to >= w1_end or w1 >= end)
            and (to >= w2_end or w2 >= end)
        )

    def _check(self, plan: CallPlan, given: CallArrays, out: Array) -> None:
        """The rules for a call's addresses."""
        x, weights, ids, to = given.x.ptr, given.topk_weights.ptr, given.topk_ids.ptr, out.ptr
        validate.writable(out, "out")
        if not plan.call.routes.tokens:
            return
        check_present((("x", x), ("topk_weights", weights), ("topk_ids", ids), ("out", to)))
        check_alignment(
            (
                ("x", x, validate.ALIGNMENT),
                ("out", to, validate.ALIGNMENT),
                ("topk_weights", weights, 4),
                ("topk_ids", ids, plan.ids_mask + 1),
            )
        )
        check_overlap("out", to, plan.call.out, (("x", x, plan.call.x), *self._matrices))

    def base_in(
        self, workspace: int, plan: CallPlan, addresses: tuple[int, int, int, int], needed: int
    ) -> int:
        """Where in the caller's workspace a call with these addresses begins. Raises as `sm12x.fused_moe`
        says."""
        x, _, _, out = addresses
        size = plan.call.workspace_bytes or 0
        base = -(-workspace // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
        end = base + needed
        (w1, w1_end), (w2, w2_end) = self._spans
        # The rules without a call for each, because this runs often; what follows says which is broken.
        if (
            workspace
            and end <= workspace + size
            and (base >= x + plan.span_x or x >= end)
            and (base >= out + plan.span_out or out >= end)
            and (base >= w1_end or w1 >= end)
            and (base >= w2_end or w2 >= end)
        ):
            return base
        enough = "FusedMoE.workspace_size gives how many"
        base = workspace_base(workspace, size, needed, enough)
        check_present((("workspace", workspace),))
        check_workspace(base, needed, (("x", x, plan.call.x), ("out", out, plan.call.out), *self._matrices))
        return base


def _ownerless(value: Any) -> Any:
    return value._replace(owner=None) if isinstance(value, Array) else value


def _matrices(weights: LayerArrays, layer: Layer) -> tuple[tuple[str, int, Matrix], ...]:
    return tuple(
        (name, array.ptr, whole(facts.inner, layer.experts, facts.group_stride))
        for name, array, facts in (("w1", weights.w1, layer.w1), ("w2", weights.w2, layer.w2))
    )


def _check_weights(weights: LayerArrays, layer: Layer) -> None:
    named = dict(weights.named())
    check_present([(name, array.ptr) for name, array in named.items() if array is not None])
    multiples = {"w1": validate.ALIGNMENT, "w2": validate.ALIGNMENT}
    for which, facts in (("1", layer.w1), ("2", layer.w2)):
        if facts.bias is not None:
            multiples[f"bias{which}"] = validate.BIAS_BYTES[facts.bias]
    check_alignment(
        [(name, array.ptr, multiples.get(name, 4)) for name, array in named.items() if array is not None]
    )
