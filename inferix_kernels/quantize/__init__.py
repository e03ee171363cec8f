"""8-bit linear layers for a model of your own, under the names of DAX (github.com/RiseAI-Sys/DAX).

    quantize_dynamic(model, {"": get_dynamic_int8_per_token_act_per_channel_weight_qconfig(), "proj_out": None})
    model = prepare(model, {"": get_fp8_per_channel_weight_qconfig()})    # static: run it on some inputs, then
    model = convert(model)
    save(model, "model.safetensors"); load(another, "model.safetensors")  # another may be on the meta device
    model = quantize_linears(model, names=["ffn.0", "ffn.2"])             # by name, a scale per row and channel

The layers are `Linear8`; `quantize_rows` and `linear` of ops.py say how they round and sum. For inference: there is no
gradient. docs/quantize.md has the whole of it.
"""

from .convert import convert, prepare, quantize_dynamic, quantize_linears
from .fused import Residual, linear_input, linear_output
from .layer import Linear8
from .qconfig import (
    QConfig,
    Scheme,
    get_default_dist_profile_qconfig,
    get_default_dynamic_fp8_qconfig,
    get_default_dynamic_int8_qconfig,
    get_default_fp8_qconfig,
    get_dynamic_fp8_per_token_act_per_channel_weight_qconfig,
    get_dynamic_int8_per_channel_weight_qconfig,
    get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
    get_fp8_per_channel_weight_qconfig,
    per_channel_symmetric,
    per_tensor_symmetric,
    per_token_symmetric,
)
from .recipe import load, recipe_of, save

__all__ = [
    "Linear8",
    "QConfig",
    "Residual",
    "Scheme",
    "convert",
    "get_default_dist_profile_qconfig",
    "get_default_dynamic_fp8_qconfig",
    "get_default_dynamic_int8_qconfig",
    "get_default_fp8_qconfig",
    "get_dynamic_fp8_per_token_act_per_channel_weight_qconfig",
    "get_dynamic_int8_per_channel_weight_qconfig",
    "get_dynamic_int8_per_token_act_per_channel_weight_qconfig",
    "get_fp8_per_channel_weight_qconfig",
    "linear_input",
    "linear_output",
    "load",
    "per_channel_symmetric",
    "per_tensor_symmetric",
    "per_token_symmetric",
    "prepare",
    "quantize_dynamic",
    "quantize_linears",
    "recipe_of",
    "save",
]
