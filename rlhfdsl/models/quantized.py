"""A frozen base in 4 bits: the linear layers inside a decoder's layers, as bitsandbytes holds them.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): a weight is one of 16 values of a normal distribution (NF4), scaled for
each block of 64; the scales are in 8 bits, themselves scaled for each 256 of them. A product computes with the weights
read back into the engine's type. Embeddings, norms, biases, heads and the output matrix stay in that type, and adapters
train in it.

To be imported before peft, which imports bitsandbytes by itself: see `_imported`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhfdsl.data import codes
from rlhfdsl.language.diagnostics import UserError

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit

NAME = "bitsandbytes"
KIND = "nf4"
BLOCK = 64  # weights of one scale
SPREAD = 0.02  # of random weights, whose values are of no account


def _imported() -> bool:
    """Import bitsandbytes where it is installed, in a way that it asks the hub for nothing.

    On a CPU with AVX-512 for bf16 it would fetch a compiled kernel from the hub and run it where the package `kernels`
    is installed, and warn where it is not. That kernel infers only, and no layer here uses it (`settle`).
    """
    if NAME in sys.modules:
        return True
    if importlib.util.find_spec(NAME) is None:
        return False
    logger = logging.getLogger(f"{NAME}.backends.cpu.ops")
    absent = object()
    held, level = sys.modules.get("kernels", absent), logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module(NAME)
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if held is not absent:
            sys.modules["kernels"] = held  # type: ignore[assignment]
    return True


HERE = _imported()


def config(empty: PreTrainedModel, dtype: torch.dtype, at: str | None) -> BitsAndBytesConfig:
    """What `from_pretrained` is told, so that it reads, moves and quantizes one weight at a time.

    empty: the model without data. Raises UserError when bitsandbytes is not installed.
    """
    if not HERE:
        raise UserError(
            codes.NO_BITSANDBYTES, "a base in 4 bits needs the package bitsandbytes, which is not installed", at=at,
            help="pip install 'rlhfdsl[qlora]'",
        )  # fmt: skip
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=KIND,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_outside(empty),
    )


def _inside(model: nn.Module) -> tuple[str, ...]:
    """The paths of the lists that hold the decoder's layers, each with a dot."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def _outside(model: nn.Module) -> list[str]:
    """The linear layers that are in no decoder layer: the output matrix, a scalar head, projections of embeddings."""
    inside = _inside(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linear if not name.startswith(inside)]


def settle(model: PreTrainedModel, at: str | None) -> None:
    """Make a model that was loaded in 4 bits one like any other, whose layers of that kind are its own matter.

    Without transformers' marks it can be moved, cast and saved; a cast leaves what is packed as it is. On a CPU such a
    layer would lay its weights out anew when it first infers, and have no gradient from then on.
    Raises UserError when the weights of its layers are not all in linear layers, as those of experts are not, or not in
    whole blocks: bitsandbytes 0.50.2 reads rows that end within one back wrongly on a CPU, and slowly elsewhere.
    """
    found, inside = layers(model), _inside(model)
    whole = [name for name, p in model.named_parameters() if p.dim() > 1 and not hasattr(p, "quant_state")]
    why = [f"`{name}` is in no linear layer" for name in whole if name.startswith(inside)]
    why += [
        f"`{name}` has {layer.in_features} inputs, which are not a multiple of {BLOCK}"
        for name, layer in found.items() if layer.in_features % BLOCK
    ]  # fmt: skip
    if why or not found:
        raise UserError(
            codes.NOT_IN_4_BITS, "the layers of this model cannot be held in 4 bits", at=at,
            help=f"{why[0] if why else 'it has no linear layer'}: base = full",
        )  # fmt: skip
    for layer in found.values():
        layer.support_avx512bf16_for_cpu = False
        layer.register_state_dict_post_hook(_without_scales)
    model.is_quantized = model.is_loaded_in_4bit = False
    model.hf_quantizer = None
    for holder in (model.config, model):
        for name in ("quantization_config", "quantization_method", "_weight_conversions"):
            vars(holder).pop(name, None)


def draw(model: PreTrainedModel, options: BitsAndBytesConfig, device: torch.device) -> None:
    """Give a model without data random weights on a device, its layers in 4 bits, one module at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    dtype = model.dtype
    replace_with_bnb_linear(model, options.llm_int8_skip_modules, options)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            shape = module.out_features, module.in_features
            whole = torch.empty(shape, dtype=dtype, device=device).normal_(std=SPREAD)
            module.weight = Params4bit(whole, compress_statistics=True, quant_type=KIND, module=module).to(device)
            if module.bias is not None:
                bias = torch.zeros(module.out_features, dtype=dtype, device=device)
                module.bias = nn.Parameter(bias, requires_grad=False)
        elif any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
    model.tie_weights()


def _without_scales(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Leave the scales out of a state dict: they belong to frozen weights, which are saved read back or not at all."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def layers(model: nn.Module) -> dict[str, Linear4bit]:
    """The layers of a model that are in 4 bits, by their path."""
    return {path: module for path, module in model.named_modules() if is_packed(module)}


def is_packed(module: nn.Module) -> TypeGuard[Linear4bit]:
    """Whether a layer is in 4 bits."""
    if not HERE:
        return False
    from bitsandbytes.nn import Linear4bit

    return isinstance(module, Linear4bit)


def transposed(layer: Linear4bit) -> bool:
    """Whether the model that was loaded holds a layer's weights [inputs, outputs], as GPT-2 does."""
    return issubclass(layer.source_cls, Conv1D)


def read_back(layer: Linear4bit) -> torch.Tensor:
    """The weights that a layer computes with, in the engine's type, as they lie in the model that was loaded."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.T if transposed(layer) else weight


def empty(layer: Linear4bit) -> torch.Tensor:
    """What `read_back` gives, without data."""
    state = layer.weight.quant_state
    shape = reversed(state.shape) if transposed(layer) else state.shape
    return torch.empty(*shape, dtype=state.dtype, device="meta")


def size(parameter: torch.Tensor) -> torch.Size:
    """The shape of a whole parameter: of packed weights that of what they stand for, under ZeRO 3 of all shards."""
    state = getattr(parameter, "quant_state", None)
    return torch.Size(state.shape) if state is not None else getattr(parameter, "ds_shape", parameter.shape)
