"""Mixture-of-experts layers from checkpoints on disk, as `sm12x.fused_moe` takes them.

`load_moe_layer` reads one layer of a Hugging Face directory; `make_checkpoint` writes small ones of the same
form. Needs `safetensors` (extra "checkpoint").
"""

from sm12x.checkpoint.layer import MoELayer, load_moe_layer
from sm12x.checkpoint.router import Router, softmax_top_k
from sm12x.checkpoint.scheme import FP8_DYNAMIC, FP8_STATIC, UNQUANTIZED, Scheme
from sm12x.checkpoint.synthetic import make_checkpoint

__all__ = [
    "FP8_DYNAMIC",
    "FP8_STATIC",
    "UNQUANTIZED",
    "MoELayer",
    "Router",
    "Scheme",
    "load_moe_layer",
    "make_checkpoint",
    "softmax_top_k",
]
