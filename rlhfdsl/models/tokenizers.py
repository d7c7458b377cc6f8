"""Tokenizers, chat templates, and what the files of a model say about it.

Nothing heavy is imported with this module: `transformers` comes with the first call that needs it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfdsl.data import codes
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.models import weights
from rlhfdsl.models.quiet import quiet
from rlhfdsl.models.weights import read_json
from rlhfdsl.planning import catalog, checkpoints, lock

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Message = Mapping[str, str]

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

# Turns in the notation of the first public preference data. The blank after "Assistant:" belongs to the
# answer, so that a byte-pair tokenizer meets the answer's first word in its usual form, with the blank in
# front.
HUMAN_ASSISTANT = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}"
    "{{- ('' if loop.first else '\n\n') + message.content | trim -}}"
    "{%- elif message.role == 'user' -%}"
    "{{- '\n\nHuman: ' + message.content | trim -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{{- '\n\nAssistant: ' + message.content | trim + (eos_token or '') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\n\nAssistant:' -}}{%- endif -%}"
)

# Some templates print today's date. A row must render the same on every day, so they are shown this one, by a
# macro that stands before transformers' own function of that name.
_TODAY = datetime(2024, 7, 26)
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace('%{letter}', '{_TODAY.strftime('%' + letter)}')" for letter in "aAbBdjHIMmpSyY")
    + " -}}{%- endmacro -%}"
)

_MODEL_FILES = ("config.json", "generation_config.json", *weights.INDEXES)
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one id for each byte of UTF-8 (id = byte), then pad 256, bos 257, eos 258.

    It needs no file and no network, and text comes back from it unchanged. It is an ordinary fast tokenizer:
    what `save_pretrained` writes, `AutoTokenizer` reads.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(_byte_alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (PAD, BOS, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> list[str]:
    """How byte-level tokenizers show each byte: as itself where it prints, else as one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def load_tokenizer(
    entry: Mapping[str, Any], base: Path, address: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model of the plan, with its chat template and a pad token set.

    base: the folder of the recipe. address: the model's, `model.tiny`, for the place of an error.

    The template is the tokenizer's own, or `HUMAN_ASSISTANT` where it has none or the recipe asks for it. A
    tokenizer without a pad token pads with its end token: masks come from lengths, so this loses nothing.
    Raises UserError when there is no usable tokenizer.
    """
    if entry["tokenizer"] == "bytes":
        tokenizer = byte_tokenizer()
    else:
        source, options, named = _located(_pinned(entry, "tokenizer"), base)
        at = _at(address, "tokenizer" if entry["tokenizer"] else "from")
        if named and not Path(source).is_dir():
            raise _no_directory(named, Path(source), at)
        tokenizer = _read_tokenizer(source, options, named, at)
    if entry["template"] == "human_assistant" or not tokenizer.chat_template:
        tokenizer.chat_template = HUMAN_ASSISTANT
    else:
        tokenizer.chat_template = tokenizer.get_chat_template()
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(source: str, options: dict, named: str | None, at: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # the library raises many kinds for a broken or missing file
        _refuse_code(f"the tokenizer of `{named or source}`", at, error)
        if not named:
            raise _hub_model(source, at, error) from error
        absent = not any((Path(source) / name).exists() for name in _TOKENIZER_FILES)
        raise UserError(
            codes.TOKENIZER,
            f"`{named}` has no tokenizer" if absent else f"the tokenizer of `{named}` cannot be read",
            at=at,
            place=named,
            help="put tokenizer.json and tokenizer_config.json there, or name another one: tokenizer = bytes"
            if absent
            else first_line(error),
        ) from error


def render(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], *, generation: bool
) -> list[str]:
    """The text of each conversation by the template, with the opening of an answer if `generation`.

    The text holds BOS where the template writes one, so it is tokenised with `add_special_tokens=False`.
    Raises whatever the template raises (`jinja2.TemplateError` for a conversation that it refuses).
    """
    template = tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(
        [list(conversation) for conversation in conversations],
        chat_template=_FIXED_DATE + template if "strftime_now" in template else template,
        tokenize=False,
        add_generation_prompt=generation,
    )


def generation_settings(entry: Mapping[str, Any], base: Path, address: str | None = None) -> dict[str, Any]:
    """The generation_config.json of a model of the plan; empty when it has none."""
    if entry["from"] is None:
        return {}
    source, options, named = _located(_pinned(entry, "from"), base)
    if named:
        path = Path(source) / "generation_config.json"
        return read_json(path, f"{named}/{path.name}", _at(address, "from")) if path.is_file() else {}
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(source, "generation_config.json", **options)
    except LocalEntryNotFoundError as error:
        # Offline. A cached snapshot with weights is whole, so the model has no such file; else nobody knows.
        config = try_to_load_from_cache(source, "config.json", **options)
        if isinstance(config, str) and checkpoints.weights(path.name for path in Path(config).parent.iterdir()):
            return {}
        raise _hub_model(source, _at(address, "from"), error) from error
    except EntryNotFoundError:
        return {}
    except Exception as error:
        raise _hub_model(source, _at(address, "from"), error) from error
    return json.loads(Path(path).read_text(encoding="utf-8"))


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Mapping[str, Any]) -> list[int]:
    """The ids that end an answer: the tokenizer's EOS first, then those of the generation config."""
    ends = generation_config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return [int(i) for i in dict.fromkeys([tokenizer.eos_token_id, *ends]) if i is not None]


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """`sha256:…` of what decides how text becomes ids: two tokenizers of one digest are interchangeable.

    The template and the pad token are not part of it.
    """
    decides: dict[str, Any] = {
        "vocab": tokenizer.get_vocab(),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        decides |= {part: state.get(part) for part in ("normalizer", "pre_tokenizer", "added_tokens")}
        decides["merges"] = state["model"].get("merges")
    return _sha256(json.dumps(decides, sort_keys=True, ensure_ascii=False).encode())


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
        source, options, named = _located(_pinned(entry, "from"), base)
        if named:
            at = _at(address, "from")
            config = _local_config(Path(source), named, at)
            paths = weights.weight_files(Path(source), named, at)
            tensors = weights.local_headers(paths, named, at)
            others = (Path(source) / name for name in _MODEL_FILES)
            files |= pin(named, Path(source), [*others, *paths])
        else:
            if not checkpoints.weights(hub[source]["files"]):
                raise weights.no_weights(source, _at(address, "from"))
            config = _hub_config(source, options, _at(address, "from"))
            tensors = weights.hub_headers(source, options, hub[source]["files"])
        numbers = _numbers(config, named or source, _at(address, "from"))
        numbers["parameters"] = weights.count(tensors, numbers["tied"])
        setting = "tokenizer" if entry["tokenizer"] else "from"
    tokenizer = load_tokenizer(entry, base, address)
    ids = max(tokenizer.get_vocab().values()) + 1
    if numbers["vocab"] is not None and numbers["vocab"] < ids:
        raise UserError(
            codes.VOCABULARY,
            f"the tokenizer has {ids} ids, and the model has {numbers['vocab']}",
            at=_at(address, setting),
            place=_named(entry["tokenizer"] or entry["from"]),
            help=f"vocab = {ids}" if setting == "vocab" else "use the tokenizer that belongs to the weights",
        )
    if entry["tokenizer"] != "bytes":
        source, _, named = _located(entry["tokenizer"] or entry["from"], base)
        if named:
            files |= pin(named, Path(source), (Path(source) / name for name in _TOKENIZER_FILES))
    stops = stop_ids(tokenizer, generation_settings(entry, base, address))
    pad = tokenizer.pad_token_id
    return {
        **numbers,
        "tokenizer": digest(tokenizer),
        "template": _sha256(tokenizer.chat_template.encode()),
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
                raise _hub_model(source["hub"], _at(address, setting), error) from error
    return pins


def _pinned(entry: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """The source of a model or its tokenizer, with the commit that the lock holds it to."""
    return lock.pinned(entry[setting] or entry["from"], entry.get("facts"))


def pin(named: str, root: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The pins of those `paths` under `root` that exist (`lock.pin`), by the name that the recipe gives them."""
    pins = {}
    for path in paths:
        if path.is_file():
            name = named if path == root else f"{named}/{path.relative_to(root).as_posix()}"
            pins[name] = lock.pin(path)
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
        raise _no_directory(named, directory, at)
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            codes.NOT_A_MODEL,
            f"`{named}` is no model: it has no config.json",
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
        _refuse_code(f"`{named}`", at, error)
        kind = raw.get("model_type")
        raise UserError(
            codes.CONFIG,
            f"transformers has no architecture `{kind}`"
            if kind
            else f"`{place}` gives no usable `model_type`",
            at=at,
            place=place,
            help=first_line(error),
        ) from error




def _hub_config(source: str, options: dict, at: str | None) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # network, authentication and parsing errors have no common base
        _refuse_code(f"`{source}`", at, error)
        raise _hub_model(source, at, error) from error


def _refuse_code(what: str, at: str | None, error: Exception) -> None:
    """Raise UserError where transformers would have to run code of the model's repository. what: which part of it."""
    if "trust_remote_code" in str(error):
        raise UserError(
            codes.CONFIG,
            f"{what} needs code of its own repository, and such code is never run",
            at=at,
            help="take a model of which transformers itself has the code; many have a version with a name in -hf",
        ) from error


def _hub_model(source: str, at: str | None, error: Exception) -> UserError:
    return UserError(
        codes.HUB_MODEL,
        f"`{source}` cannot be read from the Hugging Face hub",
        at=at,
        place=source,
        help=f"{first_line(error)} Run once with a network (HF_HUB_OFFLINE unset, `hf auth login` for a "
        'gated model), or download it and name the directory: from = "./…"',
    )


def _named(source: Mapping[str, Any] | str) -> str:
    return source if isinstance(source, str) else source.get("path") or source["hub"]


def _located(source: Mapping[str, Any], base: Path) -> tuple[str, dict[str, Any], str | None]:
    """A directory or hub id, the options to load it with, and its name in the recipe if it is a directory."""
    if "path" in source:
        return str(base / source["path"]), {}, source["path"]
    return source["hub"], {"revision": source.get("revision")}, None


def _no_directory(named: str, directory: Path, at: str | None) -> UserError:
    there = [p.name for p in directory.parent.iterdir() if p.is_dir()] if directory.parent.is_dir() else []
    near = difflib.get_close_matches(directory.name, there, n=1)
    is_file = directory.is_file()
    return UserError(
        codes.MODEL_MISSING,
        f"`{named}` is a file, not the directory of a model"
        if is_file
        else f"there is no directory `{named}`",
        at=at,
        place=named,
        help=f"did you mean `{near[0]}` beside it?"
        if near
        else "paths are relative to the recipe; a hub id is written without ./",
    )


def _at(address: str | None, setting: str) -> str | None:
    """The recipe address of a model's setting."""
    return f"{address}.{setting}" if address else None


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
