"""What a stage leaves: models in Hugging Face form, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from rlhfdsl.engines import distributed
from rlhfdsl.engines.engine import Engine
from rlhfdsl.language.files import readable
from rlhfdsl.models import quantized
from rlhfdsl.models.loading import gathered
from rlhfdsl.models.lora import Pending, adapter_config, adapter_weights, lora_layers, merged, merged_from_4_bits
from rlhfdsl.models.scalar import ScalarModel
from rlhfdsl.models.weights import INDEXES

PART = 4 << 30  # bytes of one file of weights that were in 4 bits


def save_model(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    stop_ids: tuple[int, ...],
    extra: dict | None = None,
) -> None:
    """Write the engine's model to `directory`: safetensors, configs, tokenizer, chat template. Every rank calls it.

    stop_ids: the ids that end an answer, for the generation config.
    extra: numbers kept in config.json beside the model's own (a reward model's mean and deviation).
    With LoRA the adapters are merged into the model that is written, and stand on their own in `directory`-adapter;
    the weights that train are left alone. Each directory appears at once, when all of it is on the disk.
    """
    engine.pulse(f"{engine.name}: saving")
    scalar = isinstance(engine.module, ScalarModel)
    model: PreTrainedModel = engine.module.classifier if scalar else engine.module
    weights = whole_weights(model) if engine.partitioned else None
    if distributed.rank() == 0:
        in_4_bits = bool(quantized.layers(model))
        if lora_layers(model):
            whole = weights or model.state_dict()
            _save_adapter(model, whole, directory.with_name(directory.name + "-adapter"), scalar=scalar)
            weights = {} if in_4_bits else merged(model, whole)
        partial = _emptied(directory)
        for name, value in (extra or {}).items():
            setattr(model.config, name, value)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(partial, state_dict=weights)
        if in_4_bits:
            _write_parts(model, merged_from_4_bits(model), partial)
        tokenizer.save_pretrained(partial)
        _finish_configs(partial, list(stop_ids), tokenizer.pad_token_id)
        _publish(partial, directory)
    distributed.barrier()


def _save_adapter(model: PreTrainedModel, whole: dict[str, torch.Tensor], directory: Path, *, scalar: bool) -> None:
    """Write adapters in peft's form: adapter_model.safetensors and adapter_config.json, which names the base."""
    partial = _emptied(directory)
    tensors = adapter_weights(whole, scalar=scalar)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        partial / "adapter_model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    adapter_config(model, model.config.name_or_path or None, scalar=scalar).save_pretrained(str(partial))
    path = partial / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # peft keeps a set, in another order at every start
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _publish(partial, directory)


def _write_parts(model: PreTrainedModel, tensors: dict[str, Pending], directory: Path) -> None:
    """Write weights as `save_pretrained` does, in files of `PART`, of which the host holds one at a time."""
    split = split_torch_state_dict_into_shards(
        {name: pending.empty for name, pending in tensors.items()},
        filename_pattern="model{suffix}.safetensors", max_shard_size=PART,
    )  # fmt: skip
    places = {}
    for file, names in split.filename_to_tensors.items():
        made = {name: tensors[name].make().contiguous() for name in names}
        made = revert_weight_conversion(model, made)  # to the names of the type's files
        save_file(made, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(made, file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": places}
        (directory / INDEXES[0]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _emptied(directory: Path) -> Path:
    """A new folder beside `directory`, to fill."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _publish(partial: Path, directory: Path) -> None:
    readable(partial)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(partial, directory)


def whole_weights(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """The state dict of a model whose parameters ZeRO 3 partitions, on the CPU of rank 0; None elsewhere.

    One parameter at a time, so that no device holds the whole model. Tied weights stay one tensor under two names.
    """
    whole: dict[torch.Tensor, torch.Tensor] = {}
    for parameter in model.parameters():
        with gathered([parameter]):
            if distributed.rank() == 0:
                whole[parameter] = parameter.detach().cpu().clone()
    if distributed.rank() != 0:
        return None
    names = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: whole[names[name]] if name in names else tensor for name, tensor in model.state_dict().items()
    }


def _finish_configs(directory: Path, stop_ids: list[int], pad_id: int | None) -> None:
    """Training switches the KV cache off and asks for no sampling; the saved model is for use."""
    config = json.loads((directory / "config.json").read_text())
    config["use_cache"] = True
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = directory / "generation_config.json"
    if generation.exists():
        values = json.loads(generation.read_text())
        values["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else stop_ids
        values["pad_token_id"] = pad_id
        values.pop("use_cache", None)
        generation.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
