"""`sm12x.FusedMoE`: an expert layer whose weights stay the same, planned once."""

from __future__ import annotations

from typing import Any

from ..arrays import Array
from ..tensors import current_stream, framework_of
from . import emulated, moe_validate, validate
from .arguments import device_of
from .fused_moe import fused_moe, run_layer, take_call_arrays, take_layer_arrays
from .moe_plan import LayerPlan
from .torch_layer_call import remember, run_known


class FusedMoE:
    """An expert layer: `sm12x.fused_moe` with the layer's arguments given once.

    The constructor takes what `fused_moe` takes but x, topk_weights, topk_ids, out, workspace and stream,
    with the same meaning; it checks them, makes the tensor maps and keeps the arrays alive. A call checks
    what it brings and launches: one kernel where rows are few, else four or five (one more for over 8,192
    routes), one after the other, nothing else.

    With `out` given, a call allocates nothing once another as large has run on its stream: without
    `workspace=` it uses memory of the library's own, one block for each stream, shared by all layers. Calls
    can be captured in CUDA graphs; make one of the same shapes before, because the first loads kernels, and
    give a `workspace` if the graph is not to allocate. Keep the object while a graph of it may run. Calls on
    different threads or streams do not disturb each other, unless they are given the same `workspace`.
    """

    def __init__(
        self,
        w1: Any,
        w2: Any,
        *,
        w1_scale: Any = None,
        w2_scale: Any = None,
        a1_scale: Any = None,
        a2_scale: Any = None,
        activation: str = "silu",
        gated: bool = True,
        expert_map: Any = None,
        apply_router_weight_on_input: bool = False,
        bias1: Any = None,
        bias2: Any = None,
        alpha: float | None = None,
        beta: float | None = None,
        limit: float | None = None,
        dtype: Any = None,
        early_routes: bool = False,
        backend: str | None = None,
    ) -> None:
        """Raises ValueError and TypeError naming the argument; DriverError, UnsupportedDeviceError and
        CubinError where the machine or the installation cannot run the layer."""
        self._w1, self._w2 = w1, w2
        self._layer: dict[str, Any] = {
            "w1_scale": w1_scale,
            "w2_scale": w2_scale,
            "a1_scale": a1_scale,
            "a2_scale": a2_scale,
            "activation": activation,
            "gated": gated,
            "expert_map": expert_map,
            "apply_router_weight_on_input": apply_router_weight_on_input,
            "bias1": bias1,
            "bias2": bias2,
            "alpha": alpha,
            "beta": beta,
            "limit": limit,
            "dtype": dtype,
            "early_routes": early_routes,
        }
        self._backend = "emulator" if emulated.wanted(backend) else "auto"
        self._plan: LayerPlan | None = None
        self._inputs: list[Array] = []
        framework = framework_of(w1, "w1")
        if self._backend == "emulator" or framework == "numpy":
            arrays, options = take_layer_arrays(w1, w2, self._layer, 0)
            moe_validate.take_layer(arrays, options)
            return
        stream = current_stream(framework, device_of(w1, framework, "w1"))
        arrays, options = take_layer_arrays(w1, w2, self._layer, stream)
        self._plan = LayerPlan(arrays, options)
        self._inputs = [array for _, array in arrays.named() if array is not None]

    def __call__(
        self,
        x: Any,
        topk_weights: Any,
        topk_ids: Any,
        *,
        out: Any = None,
        workspace: Any = None,
        stream: Any = None,
    ) -> Any:
        """The layer's output for tokens `x` (T, H) and their routes, as `sm12x.fused_moe` gives it."""
        if self._plan is None:
            return fused_moe(
                x,
                self._w1,
                self._w2,
                topk_weights,
                topk_ids,
                **self._layer,
                out=out,
                workspace=workspace,
                stream=stream,
                backend=self._backend,
            )
        fresh = stream is None and out is not None
        if fresh and run_known(self._plan, x, topk_weights, topk_ids, out, workspace):
            return out
        handle, given, device = take_call_arrays(x, topk_weights, topk_ids, out, workspace, stream)
        plan, result = run_layer(self._plan, given, out, handle, device, self._inputs)
        if fresh and given.x.framework == "torch":
            remember(self._plan, plan, x, topk_weights, topk_ids, out, workspace)
        return result

    def workspace_size(self, tokens: int, top_k: int, dtype: Any = "bfloat16") -> int:
        """Bytes of `workspace=` that are enough for calls of up to `tokens` tokens of `dtype` with `top_k`
        routes each. 0 where no device runs the layer. A workspace's first byte used is at a multiple of 256:
        arrays of every framework begin there; for a slice that does not, add 256.

        Raises ValueError and TypeError naming the argument.
        """
        for argument, value, least in (("tokens", tokens, 0), ("top_k", top_k, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{argument}: expected an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{argument}: expected at least {least}, got {value}")
        if tokens > moe_validate.MAX_TOKENS:
            raise ValueError(f"tokens: expected at most {moe_validate.MAX_TOKENS}, got {tokens}")
        if tokens * top_k > validate.INT32_MAX:
            raise ValueError(
                f"top_k: expected at most {validate.INT32_MAX} routes of all tokens, got {tokens * top_k}"
            )
        name = validate.dtype_name(dtype, "dtype")
        if name not in moe_validate.LAYER_DTYPES:
            raise ValueError(f"dtype: expected {' or '.join(moe_validate.LAYER_DTYPES)}, got {dtype!r}")
        return 0 if self._plan is None else self._plan.workspace_size(tokens, top_k, name)
