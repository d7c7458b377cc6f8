"""From an engine of the plan to a model in memory: a hub id, a directory, an earlier stage's artifact, or scratch."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhfdsl.data import codes
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.language.files import readable
from rlhfdsl.models import quantized
from rlhfdsl.models.exhausted import out_of_memory
from rlhfdsl.models.lora import add_adapters
from rlhfdsl.models.quiet import quiet
from rlhfdsl.models.scalar import HEAD, ScalarModel, reset_head
from rlhfdsl.models.scratch import scratch_config
from rlhfdsl.models.tokenizers import load_tokenizer
from rlhfdsl.models.weights import INDEXES, PICKLE, index_names

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# The dropout rates of the families that transformers knows, by configuration attribute.
_DROPOUT = (
    "dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "summary_first_dropout", "classifier_dropout", "classifier_dropout_prob", "embed_dropout", "resid_dropout",
    "ffn_dropout", "residual_dropout",
)  # fmt: skip


def load_model(
    engine: dict,
    source: str,
    *,
    revision: str | None,
    seed: int,
    device: torch.device | None = None,
    pickles: Sequence[str] = (),
) -> nn.Module:
    """The module that an engine of the plan trains or scores with, partitioned where ZeRO 3 is.

    engine: its entry in the plan (head, dtype, attention, dropout, gradient_checkpointing, lora).
    source: a hub id or a directory in Hugging Face form.
    seed: fills a scalar head that the source does not have, and new adapters.
    device: where the weights are read to, each in the engine's dtype, so that the host never holds them all; left
    out, the CPU. Without effect while ZeRO 3 partitions.
    pickles: the files of weights in .bin form, where the source has no others and the lock pins them; without them
    only safetensors are read.
    Returns a causal model of transformers, or a `ScalarModel` for `head = scalar`.
    Raises UserError when the source holds no decoder that transformers can load, and for a pickle that holds more
    than tensors, of which nothing is run. Memory that runs out is raised as torch or Python says it.
    """
    if pickles:
        _look_into(pickles, source, revision, engine["base"])
    scalar = engine["head"] == "scalar"
    automodel = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    options = {"attn_implementation": engine["attention"], "dtype": DTYPES[engine["dtype"]], "revision": revision}
    # No code of a repository runs, in a pickle neither: with weights_only torch builds tensors and nothing else.
    options |= {"trust_remote_code": False, "use_safetensors": not pickles, "weights_only": True}
    options["ignore_mismatched_sizes"] = True  # they come back in `info`, by name and shape
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # transformers would ask a service to convert the repository
    if device is not None and engine["deepspeed"]["zero_optimization"]["stage"] < 3:
        options["device_map"] = {"": device}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            for name in _DROPOUT:
                if isinstance(getattr(config, name, None), float | int):
                    setattr(config, name, engine["dropout"])
            if scalar:
                config.num_labels = 1
            if in_4_bits(engine):
                with torch.device("meta"):
                    empty = automodel.from_config(config)
                options["quantization_config"] = quantized.config(empty, options["dtype"], engine["base"])
            model, info = automodel.from_pretrained(source, config=config, output_loading_info=True, **options)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            if out_of_memory(error):
                raise
            raise UserError(
                "E0820",
                f"`{source}` cannot be loaded as a {'reward or value' if scalar else 'causal language'} model",
                at=engine["base"],
                help=first_line(error),
            ) from error
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            "E0821",
            f"`{name}` of `{source}` has the shape {list(found)}, and its architecture {list(wanted)}",
            at=engine["base"],
            help="config.json does not belong to these weights",
        )
    missing = sorted(set(info["missing_keys"]) - {HEAD} - set(getattr(model, "_tied_weights_keys", None) or ()))
    if missing:
        raise UserError(
            "E0821",
            f"the weights of `{source}` lack {len(missing)} tensors of its architecture, `{missing[0]}` among them",
            at=engine["base"],
            help="the directory is incomplete or belongs to another architecture",
        )
    model.config.use_cache = False
    if in_4_bits(engine):
        quantized.settle(model, engine["base"])
    if engine["lora"] is not None:
        add_adapters(model, engine["lora"], seed=seed, scalar=scalar)
    if not scalar:
        if engine["gradient_checkpointing"]:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model
    if HEAD in info["missing_keys"]:
        with gathered([model.score.weight]):
            reset_head(model.score.weight.data, seed)
    wrapped = ScalarModel(model)
    if engine["gradient_checkpointing"]:
        wrapped.gradient_checkpointing_enable()
    return wrapped


def in_4_bits(engine: dict) -> bool:
    """Whether an engine's weights are frozen in 4 bits beside its adapters."""
    return engine["lora"] is not None and engine["lora"].get("base") == quantized.KIND


def _look_into(pickles: Sequence[str], source: str, revision: str | None, at: str) -> None:
    """Read what pickled weights list, and no tensor's data. Raises UserError for one that is anything but tensors."""
    local = Path(source)

    def located(name: str) -> Path:
        return local / name if local.is_dir() else Path(hf_hub_download(source, name, revision=revision))

    if PICKLE not in pickles:
        listed = index_names(located(INDEXES[1]), f"{source}/{INDEXES[1]}", at)
        strange = sorted(set(listed) - set(pickles))
        if strange:
            message = f"the index of `{source}` lists {strange[0]}, which is not locked"
            raise UserError(codes.WEIGHTS, message, at=at, place=f"{source}/{INDEXES[1]}", help="lock the recipe again")
    for name in pickles:
        path = located(name)
        try:
            held = torch.load(path, map_location="meta", weights_only=True)
            if not isinstance(held, Mapping) or not all(isinstance(value, torch.Tensor) for value in held.values()):
                raise ValueError("it is not a table of tensors")
        except Exception as error:  # what is wrong in a pickle surfaces as whatever its instructions meet
            # torch puts the advice to load the file unsafely around what its unpickler said.
            why = first_line(error.__context__ or error)
            raise UserError(
                codes.UNSAFE_PICKLE,
                f"`{name}` of `{source}` cannot be read safely as weights",
                at=at,
                place=str(path),
                help=f"{why} Nothing of it was run: copy it again, or take the model from another place",
            ) from error


def make_scratch(entry: dict, base: Path, directory: Path, seed: int) -> None:
    """Write a model from scratch to `directory` in Hugging Face form: fp32 weights, tokenizer and template.

    The weights are drawn once, on one process, and then loaded like any other: built under ZeRO 3 or on another
    number of ranks they would be drawn differently.
    """
    tokenizer = load_tokenizer(entry, base)
    pad = tokenizer.pad_token_id
    config = scratch_config(
        entry["arch"], pad_id=pad, bos_id=tokenizer.bos_token_id, eos_id=tokenizer.eos_token_id
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.pad_token_id = pad
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    readable(directory)


@contextlib.contextmanager
def partitioned(deepspeed_config: dict):
    """While open, models built by `from_pretrained` are partitioned over the ranks if the config is ZeRO 3.

    transformers keeps this switch global to the process: it must be closed before the next model is built, or that
    one is partitioned too.
    """
    if deepspeed_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    switch = HfDeepSpeedConfig(deepspeed_config)
    try:
        yield
    finally:
        del switch
        gc.collect()
        unset_hf_deepspeed_config()


def gathered(parameters: list[torch.Tensor]):
    """A context in which parameters partitioned by ZeRO 3 are whole, and written back from rank 0 after it."""
    from deepspeed import zero

    if any(hasattr(p, "ds_id") for p in parameters):
        return zero.GatheredParameters(parameters, modifier_rank=0)
    return contextlib.nullcontext()


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module, partitioned by ZeRO 3 or not, packed or not."""
    return sum(math.prod(quantized.size(p)) for p in module.parameters())
