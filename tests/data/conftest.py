"""A folder with data files and models, and the smallest plan around them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfdsl.data.edge import Rows, load_edge
from rlhfdsl.data.facts import edge_facts
from rlhfdsl.models.tokenizers import byte_tokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml_tokenizer(**specials: str | None) -> Any:
    """Bytes and ChatML markers, with pad = eos as SmolLM2 has it: <|im_start|> is 256, <|im_end|> 257."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    state["added_tokens"] = []
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<|im_start|>", "<|im_end|>")]
    )
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **specials}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token},
    )
    tokenizer.chat_template = CHATML
    return tokenizer


class Folder:
    """What a recipe's folder holds, and a plan that reads it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.plan: dict[str, Any] = {"models": {}, "data": {}, "blends": {}}
        self.model("model.bytes", tokenizer="bytes")

    def write(self, name: str, content: Any) -> Path:
        """Rows as JSON lines, or text or bytes as they are."""
        path = self.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def model(self, address: str, **entry: Any) -> None:
        self.plan["models"][address] = {
            "from": None, "arch": None, "tokenizer": None, "template": "auto", **entry
        }  # fmt: skip

    def chatml(self, template: str = CHATML, ends: Any = None, **specials: str | None) -> None:
        """A model directory `chat`: a ChatML tokenizer, a template, the ends in its generation config."""
        tokenizer = chatml_tokenizer(**specials)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(self.base / "chat")
        if ends is not None:
            self.write("chat/generation_config.json", json.dumps({"eos_token_id": ends}))
        self.model("model.chat", **{"from": {"path": "chat"}})

    def data(self, address: str, path: str, format: str, **entry: Any) -> None:
        self.plan["data"][address] = {
            "from": {"path": path}, "subset": None, "split": "train", "format": format, "turns": "none",
            "columns": {}, "rows": None, **entry,
        }  # fmt: skip

    def blend(self, mix: dict[str, Any], split: dict[str, float] | None = None, **entry: Any) -> None:
        self.plan["blends"]["blend.b"] = {
            "by": "samples", "until": "first", "shuffle": True, "split": split, "mix": mix, **entry
        }  # fmt: skip

    def edge(self, source: str, read: str, **edge: Any) -> dict[str, Any]:
        return {
            "source": source, "part": None, "read": read, "length": 1000,
            "overlong": "drop" if read == "prompt" else "cut",
            "loss": "answer" if read == "chat" else None, "model": "model.bytes", **edge,
        }  # fmt: skip

    def load(self, source: str, read: str, **edge: Any) -> Rows:
        edge = self.edge(source, read, **edge)
        tokenizer = load_tokenizer(self.plan["models"][edge["model"]], self.base, edge["model"])
        return load_edge(self.plan, edge, self.base, tokenizer)

    def facts(self, source: str, read: str, **edge: Any) -> dict[str, Any]:
        return edge_facts(self.plan, self.edge(source, read, **edge), self.base)

    def rows(self, written: Any, format: str, read: str, name: str = "own.jsonl", **settings: Any) -> Rows:
        """Write rows to a file and load them: `settings` of the data block first, then those of the edge."""
        block = {key: settings.pop(key) for key in ("turns", "columns", "rows", "split") if key in settings}
        self.write(name, written)
        self.data("data.own", name, format, **block)
        return self.load("data.own", read, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture(scope="session")
def say() -> SimpleNamespace:
    """Short spellings of messages."""
    return SimpleNamespace(
        system=lambda text: {"role": "system", "content": text},
        user=lambda text: {"role": "user", "content": text},
        bot=lambda text: {"role": "assistant", "content": text},
    )
