"""Tokenizers, chat templates, and the ids that end an answer.

Nothing heavy is imported with this module: `transformers` comes with the first call that needs it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfdsl.data import codes
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.models.quiet import quiet
from rlhfdsl.models.sources import hub_model, located, no_directory, pinned, refuse_code, setting_at
from rlhfdsl.models.weights import read_json
from rlhfdsl.planning import checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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

TOKENIZER_FILES = (
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
        source, options, named = located(pinned(entry, "tokenizer"), base)
        at = setting_at(address, "tokenizer" if entry["tokenizer"] else "from")
        if named and not Path(source).is_dir():
            raise no_directory(named, Path(source), at)
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
            found = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
        # what transformers makes of a known model type whose files are missing: any text is unknown to it
        if set(found.get_vocab()) <= set(found.all_special_tokens):
            raise ValueError("it has no token but special ones")
        return found
    except Exception as error:  # the library raises many kinds for a broken or missing file
        refuse_code(f"the tokenizer of `{named or source}`", at, error)
        if not named:
            raise hub_model(source, at, error) from error
        absent = not any((Path(source) / name).exists() for name in TOKENIZER_FILES)
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
    source, options, named = located(pinned(entry, "from"), base)
    if named:
        path = Path(source) / "generation_config.json"
        return read_json(path, f"{named}/{path.name}", setting_at(address, "from")) if path.is_file() else {}
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(source, "generation_config.json", **options)
    except LocalEntryNotFoundError as error:
        # Offline. A cached snapshot with weights is whole, so the model has no such file; else nobody knows.
        config = try_to_load_from_cache(source, "config.json", **options)
        if isinstance(config, str) and checkpoints.weights(path.name for path in Path(config).parent.iterdir()):
            return {}
        raise hub_model(source, setting_at(address, "from"), error) from error
    except EntryNotFoundError:
        return {}
    except Exception as error:
        raise hub_model(source, setting_at(address, "from"), error) from error
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
    return sha256(json.dumps(decides, sort_keys=True, ensure_ascii=False).encode())


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
