"""LoRA: small adapters beside frozen weights, made by peft inside the model, which stays a model of its own class.

The adapters are injected in place, so that `generate`, the configuration and the forward of the model are what they
were. While they train the base is never written: with them off, the model is bit for bit the one that was loaded.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from rlhfdsl.models import quantized

# peft imports bitsandbytes too, and `quantized` does it first
# isort: split
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.models.scalar import HEAD

NAME = "default"  # the name that peft gives an adapter


def add_adapters(model: PreTrainedModel, lora: dict, *, seed: int, scalar: bool) -> None:
    """Freeze a model and put adapters beside its linear layers, in the model's dtype; a scalar head still trains.

    lora: of an engine of the plan (rank, alpha, dropout, targets). The first matrix is drawn from `seed`, the second
    is 0, so that nothing changes before the first update.
    Raises UserError when no module of the model is named as a target.
    """
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["targets"],
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        modules_to_save=None,
    )
    dtype = model.dtype
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that GPT-2's matrices lie the other way round, which peft sees to itself
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, NAME)
    except ValueError as error:
        raise UserError(
            "E0822", "the adapters find no layer of the model", help=first_line(error),
        ) from error  # fmt: skip
    for layer in lora_layers(model):
        for part in (layer.lora_A[NAME], layer.lora_B[NAME]):
            part.to(dtype)
    if scalar:
        model.get_parameter(HEAD).requires_grad_(True)


def lora_layers(module: nn.Module) -> list[LoraLayer]:
    """The layers of a module that carry an adapter, in its order; none without LoRA."""
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


@contextlib.contextmanager
def adapters_off(layers: list[LoraLayer]) -> Iterator[None]:
    """While open, the layers compute what their frozen base does.

    peft's own `enable_adapters` also takes the gradient off the adapters, which an optimizer that holds them must not
    see; only its switch is turned here.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextlib.contextmanager
def adapters_on_half(layers: list[LoraLayer], tokens: int) -> Iterator[None]:
    """While open, adapters add to the first half of a batch's rows; the second half is what the frozen base computes.

    tokens: of the batch, padding counted. Layers see them as [B, T, n] or flattened to [B x T, n]; one that sees them
    otherwise, as an expert its own, raises RuntimeError. Without gradients only.
    """

    def halve(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.numel() != tokens * output.shape[-1]:
            raise RuntimeError(f"an adapter sees {tuple(output.shape)} of a batch of {tokens} tokens")
        output.view(2, -1)[1].zero_()  # not times 0, which would keep what overflows

    hooks = [layer.lora_B[NAME].register_forward_hook(halve) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def merged(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the plain model that `model` with its adapters is: base + alpha / rank x B A.

    weights: the whole state dict of `model`, which is left as it is. Sums are made in fp32 on the CPU and rounded once
    to the dtype of the base. The names are those of the model without adapters.
    """
    plain = {_plain(name): tensor for name, tensor in weights.items() if ".lora_" not in name}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            parts = [weights[f"{path}.{part}.{NAME}.weight"] for part in ("lora_A", "lora_B")]
            transposed = getattr(layer, "fan_in_fan_out", False)
            plain[f"{path}.weight"] = _sum(layer, weights[f"{path}.base_layer.weight"], *parts, transposed)
    return plain


def _sum(
    layer: LoraLayer, base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, transposed: bool
) -> torch.Tensor:
    delta = layer.scaling[NAME] * (up.cpu().float() @ down.cpu().float())
    return (base.cpu().float() + (delta.T if transposed else delta)).to(base.dtype)


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when it is asked for. empty: what it will be, without data."""

    empty: torch.Tensor
    make: Callable[[], torch.Tensor]


def merged_from_4_bits(model: PreTrainedModel) -> dict[str, Pending]:
    """As `merged`, of a model whose layers are in 4 bits: what was trained is added to what they compute with.

    Whole, its weights are four times those of the device, so each is made by itself. A tied weight comes once.
    """
    packed = quantized.layers(model)
    found = {name: _pending(tensor.detach()) for name, tensor in model.named_parameters()}
    lasting = model.state_dict().keys()
    found |= {name: _pending(tensor) for name, tensor in model.named_buffers() if name in lasting}
    for path, layer in packed.items():
        found[f"{path}.weight"] = Pending(quantized.empty(layer), partial(_from_4_bits, model, path, layer))
    return {_plain(name): pending for name, pending in found.items() if ".lora_" not in name}


def _pending(tensor: torch.Tensor) -> Pending:
    return Pending(torch.empty_like(tensor, device="meta"), tensor.cpu)


def _from_4_bits(model: PreTrainedModel, path: str, layer: nn.Module) -> torch.Tensor:
    base, owner = quantized.read_back(layer), model.get_submodule(path.removesuffix(".base_layer"))
    if not isinstance(owner, LoraLayer):
        return base.cpu()
    parts = [part[NAME].weight.detach() for part in (owner.lora_A, owner.lora_B)]
    return _sum(owner, base, *parts, quantized.transposed(layer))


def adapter_weights(weights: Mapping[str, torch.Tensor], *, scalar: bool) -> dict[str, torch.Tensor]:
    """The adapters of a whole state dict, and a scalar head beside them, under the names of peft's files."""
    kept = {name: tensor for name, tensor in weights.items() if ".lora_" in name or (scalar and name == HEAD)}
    return {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor for name, tensor in kept.items()}


def adapter_config(model: PreTrainedModel, base: str | None, *, scalar: bool) -> LoraConfig:
    """The configuration under which `PeftModel.from_pretrained` loads `adapter_weights` beside the model `base`."""
    config = copy.deepcopy(model.peft_config[NAME])
    config.base_model_name_or_path = base
    config.modules_to_save = ["score"] if scalar else None
    config.inference_mode = True
    return config


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")
