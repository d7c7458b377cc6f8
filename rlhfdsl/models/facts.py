"""What planning needs to know of a model, read of its configuration, the headers of its weights and its tokenizer.

Nothing heavy is imported with this module: `transformers` comes with the first call that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfdsl.data import codes
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.models import weights
from rlhfdsl.models.sources import hub_model, located, no_directory, pin, pinned, refuse_code, setting_at
from rlhfdsl.models.tokenizers import (
    HUMAN_ASSISTANT,
    TOKENIZER_FILES,
    digest,
    generation_settings,
    load_tokenizer,
    sha256,
    stop_ids,
)
from rlhfdsl.models.weights import read_json
from rlhfdsl.planning import catalog, checkpoints

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MODEL_FILES = ("config.json", "generation_config.json", *weights.INDEXES)


def model_facts(entry: Mapping[str, Any], base: Path, address: str | None = None) -> dict[str, Any]:
    """What planning needs of a model (MODELFACTS): shape, exact parameters, tokenizer, template, files.

    `parameters` counts the causal model without a scalar head, from the headers of its safetensors files (of
    the hub, when it answers) or from the numbers of a model from scratch; None when nothing tells, as with pickled
    weights, which are not opened here. Raises UserError for a directory that is missing or no model, and for a
    broken configuration, weights header or tokenizer.
    """
    files: dict[str, dict[str, Any]] = {}
    hub = _hub_pins(entry, address)
    # All that follows is read of the commits that the pins name.
    entry = {**entry, "facts": {"hub": hub}}
    if entry["from"] is None:
        arch = entry["arch"]
        names = ("type", "layers", "hidden", "heads", "kv_heads", "intermediate", "vocab", "context", "tied")
        numbers = {name: arch[name] for name in names}
        shape = catalog.shape(numbers)
        numbers["parameters"] = None if shape is None else catalog.parameters(shape)
        setting = "vocab"
    else:
        source, options, named = located(pinned(entry, "from"), base)
        if named:
            at = setting_at(address, "from")
            config = _local_config(Path(source), named, at)
            paths = weights.weight_files(Path(source), named, at)
            tensors = weights.local_headers(paths, named, at)
            others = (Path(source) / name for name in _MODEL_FILES)
            files |= pin(named, Path(source), [*others, *paths])
        else:
            if not checkpoints.weights(hub[source]["files"]):
                raise weights.no_weights(source, setting_at(address, "from"))
            config = _hub_config(source, options, setting_at(address, "from"))
            tensors = weights.hub_headers(source, options, hub[source]["files"])
        numbers = _numbers(config, named or source, setting_at(address, "from"))
        numbers["parameters"] = weights.count(tensors, numbers["tied"])
        setting = "tokenizer" if entry["tokenizer"] else "from"
    tokenizer = load_tokenizer(entry, base, address)
    ids = max(tokenizer.get_vocab().values()) + 1
    if numbers["vocab"] is not None and numbers["vocab"] < ids:
        raise UserError(
            codes.VOCABULARY,
            f"the tokenizer has {ids} ids, and the model has {numbers['vocab']}",
            at=setting_at(address, setting),
            place=_named(entry["tokenizer"] or entry["from"]),
            help=f"vocab = {ids}" if setting == "vocab" else "use the tokenizer that belongs to the weights",
        )
    if entry["tokenizer"] != "bytes":
        source, _, named = located(entry["tokenizer"] or entry["from"], base)
        if named:
            files |= pin(named, Path(source), (Path(source) / name for name in TOKENIZER_FILES))
    stops = stop_ids(tokenizer, generation_settings(entry, base, address))
    pad = tokenizer.pad_token_id
    return {
        **numbers,
        "tokenizer": digest(tokenizer),
        "template": sha256(tokenizer.chat_template.encode()),
        "template_name": "human_assistant" if tokenizer.chat_template == HUMAN_ASSISTANT else "own",
        "pad_id": pad,
        "stop_ids": stops,
        "pad_is_eos": pad is not None and pad in stops,
        "files": dict(sorted(files.items())),
    } | ({"hub": hub} if hub else {})


def _hub_pins(entry: Mapping[str, Any], address: str | None) -> dict[str, Any]:
    """The pins of the hub repositories that a model and its tokenizer come from, by their names."""
    from rlhfdsl.models.hub import pin_repo

    pins = {}
    for setting, kind in (("from", "model"), ("tokenizer", "tokenizer")):
        source = entry[setting]
        if isinstance(source, Mapping) and "hub" in source and source["hub"] not in pins:
            try:
                pins[source["hub"]] = pin_repo(source["hub"], kind, source.get("revision"))
            except Exception as error:  # network, authentication and missing repositories have no common base
                raise hub_model(source["hub"], setting_at(address, setting), error) from error
    return pins


def _numbers(config: PretrainedConfig, named: str, at: str | None) -> dict[str, Any]:
    """The shape of a decoder. transformers maps each family's spelling to the common attribute names."""
    config = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            codes.NOT_A_MODEL,
            f"`{named}` is an encoder-decoder ({config.model_type}); the stages train decoders",
            at=at,
            place=named,
            help="use a causal language model",
        )
    try:
        layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        vocab = config.vocab_size
    except AttributeError as error:
        raise UserError(
            codes.NOT_A_MODEL,
            f"the configuration of `{named}` ({config.model_type}) is not that of a language model: {error}",
            at=at,
            place=named,
            help="use a causal language model",
        ) from error
    widths = (getattr(config, name, None) for name in ("ffn_dim", "intermediate_size", "n_inner"))
    return {
        "type": config.model_type,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "intermediate": next((width for width in widths if width), 4 * hidden),
        "vocab": vocab,
        "context": getattr(config, "max_position_embeddings", None),
        "tied": bool(getattr(config, "tie_word_embeddings", False)),
        "head_dim": getattr(config, "head_dim", None),
    }


def _local_config(directory: Path, named: str, at: str | None) -> PretrainedConfig:
    if not directory.is_dir():
        raise no_directory(named, directory, at)
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            codes.NOT_A_MODEL,
            f"`{named}` is not a model: it has no config.json",
            at=at,
            place=named,
            help="name a directory that `save_pretrained` or a stage wrote",
        )
    place = f"{named}/config.json"
    raw = read_json(path, place, at)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a wrong type of value surfaces as whatever the family's code raises
        refuse_code(f"`{named}`", at, error)
        kind = raw.get("model_type")
        raise UserError(
            codes.CONFIG,
            f"transformers has no architecture `{kind}`" if kind else f"`{place}` gives no usable `model_type`",
            at=at,
            place=place,
            help=first_line(error),
        ) from error


def _hub_config(source: str, options: dict, at: str | None) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # network, authentication and parsing errors have no common base
        refuse_code(f"`{source}`", at, error)
        raise hub_model(source, at, error) from error


def _named(source: Mapping[str, Any] | str) -> str:
    return source if isinstance(source, str) else source.get("path") or source["hub"]
