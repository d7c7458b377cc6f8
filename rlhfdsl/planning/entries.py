"""Blocks of the recipe that stages name, as they stand in the plan: models, data, blends, and edges between
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhfdsl.language.recipe import Block, Recipe, Reference, Source
from rlhfdsl.planning import catalog
from rlhfdsl.planning.catalog import Shape, shape
from rlhfdsl.planning.families import GATED
from rlhfdsl.planning.lock import key_of
from rlhfdsl.planning.problems import Problems

BYTE_VOCAB = 259  # 256 bytes and three special tokens
LEAST_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the plan: its JSON entry, and its numbers where an arch, the lock or the catalog gives
    them."""

    address: str
    entry: dict[str, Any]
    shape: Shape | None
    causal: int | None  # parameters as a causal model

    @property
    def dtype(self) -> str:
        return str(self.entry["dtype"])

    def count(self, head: str) -> int | None:
        """Parameters with the given head: a scalar head takes the place of an untied output matrix."""
        if self.causal is None or head == "none":
            return self.causal
        if self.shape is None:
            return None
        output = 0 if self.shape.tied else self.shape.vocab * self.shape.embed
        return self.causal - output + self.head_count(head)

    def head_count(self, head: str) -> int:
        """Parameters of the head itself: a scalar one is a row over the backbone's output."""
        return self.shape.embed if head == "scalar" and self.shape is not None else 0


def source(value: Source, revision: str | None) -> dict[str, Any]:
    """`from` in the plan: {"hub", "revision"} or {"path"}."""
    if value.kind == "hub":
        return {"hub": value.text, "revision": revision}
    return {"path": value.path}


def model(
    block: Block, longest: int, lock: Mapping[str, Any], known: Mapping[str, Any], problems: Problems
) -> Model:
    """The entry of a model block. `longest` is the longest sequence that a stage gives it."""
    arch = None if block["arch"] is None else _arch(block, longest, problems)
    tokenizer = block["tokenizer"]
    entry: dict[str, Any] = {
        "from": source(block["from"], block["revision"]) if arch is None else None,
        "arch": arch,
        "dtype": block["dtype"],
        "head": block["head"] or "none",
        "attention": block["attention"],
        "tokenizer": source(tokenizer, None) if isinstance(tokenizer, Source) else _named(tokenizer, arch),
        "template": block["template"] or "auto",
    }
    decides = {name: entry[name] for name in ("from", "arch", "tokenizer", "template")}
    entry["key"] = key_of(decides)
    facts = lock["models"].get(entry["key"])
    entry["facts"] = facts
    given = numbers(entry, facts, known.get(block.address))
    found = shape(given) if given is not None else None
    counted = given.get("parameters") if given is not None else None
    causal = counted if counted is not None else catalog.parameters(found) if found is not None else None
    return Model(block.address, entry, found, causal)


def _named(tokenizer: str | None, arch: dict[str, Any] | None) -> str | None:
    if tokenizer == "bytes" or (arch is not None and tokenizer in (None, "from")):
        return "bytes"
    return None


def numbers(
    entry: Mapping[str, Any], facts: Mapping[str, Any] | None, known: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Configuration numbers by strength: arch, then the lock's facts, then a directory's or the catalog's."""
    if entry["arch"] is not None:
        return dict(entry["arch"])
    listed = catalog.lookup(entry["from"]["hub"]) if "hub" in entry["from"] else known
    if facts is not None:
        return {**(listed or {}), **{name: value for name, value in facts.items() if value is not None}}
    return listed


def _arch(block: Block, longest: int, problems: Problems) -> dict[str, Any]:
    """The complete numbers of a model from scratch; defaults as in the language's reference."""
    kind, hidden, heads = block["arch"], block["hidden"], block["heads"]
    kv_heads = block["kv_heads"] or heads
    address = block.address
    if kind in GATED | {"gpt_neox"} and hidden // heads % 2:
        problems.report(
            "E0709", f"a head of {kind} is {hidden // heads} wide, and rotary positions need an even width",
            f"{address}.hidden", notes=[f"{hidden // heads} = hidden {hidden} / heads {heads}"],
            help=f"hidden = {(hidden // heads + 1) * heads} gives {hidden // heads + 1}",
        )  # fmt: skip
    if kv_heads != heads and kind not in GATED:
        problems.report(
            "E0709", f"{kind} has as many key heads as heads, and kv_heads = {kv_heads} is not {heads}",
            f"{address}.kv_heads", help="leave kv_heads out, or take arch = llama",
        )  # fmt: skip
    in_bytes = not isinstance(block["tokenizer"], Source)
    vocab = block["vocab"] or (BYTE_VOCAB if in_bytes else None)
    if in_bytes and vocab is not None and vocab < BYTE_VOCAB:
        problems.report(
            "E0709", f"vocab = {vocab} is smaller than the byte tokenizer's {BYTE_VOCAB}", f"{address}.vocab",
            notes=[f"{BYTE_VOCAB} = 256 bytes + 3 special tokens"],
            help=f"vocab = {BYTE_VOCAB}, or leave it out",
        )  # fmt: skip
    if vocab is None:
        problems.report(
            "E0709", f"`{address}` has a tokenizer of its own and no `vocab`", f"{address}.tokenizer",
            help="vocab = the number of ids of that tokenizer",
        )  # fmt: skip
    tied = block["tied"]
    return {
        "type": kind,
        "layers": block["layers"],
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "intermediate": block["intermediate"] or default_intermediate(kind, hidden),
        "vocab": vocab,
        "context": block["context"] or max(LEAST_CONTEXT, longest),
        "tied": tied if tied is not None else in_bytes or kind in ("opt", "gpt2"),
    }


def default_intermediate(kind: str, hidden: int) -> int:
    """4 hidden; for gated families 8/3 hidden (the same parameters) rounded up to a multiple of 32."""
    if kind in GATED:
        return -(-8 * hidden // (3 * 32)) * 32
    return 4 * hidden


def data(block: Block) -> dict[str, Any]:
    """The entry of a data block."""
    columns = block.blocks.get("columns")
    return {
        "from": source(block["from"], block["revision"]),
        "subset": block["subset"] if block["from"].kind == "hub" else None,
        "split": block["split"],
        "format": block["format"],
        "turns": block["turns"] or "none",
        "columns": {} if columns is None else {name: s.value for name, s in columns.settings.items()},
        "rows": block["rows"],
    }


def blend(block: Block) -> dict[str, Any]:
    """The entry of a blend block; `mix[""]` holds the shares of every part that has none of its own."""
    split = block.blocks.get("split")
    mixes = {key: inner for key, inner in block.blocks.items() if key == "mix" or key.startswith("mix.")}
    return {
        "by": block["by"],
        "until": block["until"],
        "shuffle": block["shuffle"],
        "split": {name: s.value for name, s in split.settings.items()} if split and split.settings else None,
        "mix": {
            key.removeprefix("mix").removeprefix("."): {
                f"data.{name}": s.value for name, s in inner.settings.items()
            }
            for key, inner in mixes.items()
        },
    }


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a stage reads over one edge."""

    reference: Reference
    part: str  # of a blend, when the reference names none
    reader: str  # "sft", "pairs", "prompts" or "ptx"
    length: int
    overlong: str
    loss: str | None


def edge(want: Wanted, model: Model, recipe: Recipe, lock: Mapping[str, Any]) -> dict[str, Any]:
    """A data edge of the plan: what is read, how long, for which tokenizer, and its facts where locked."""
    block = recipe.blocks[want.reference.address]
    part: str | None = None
    shares = {block.address: 1.0}
    blending: dict[str, Any] = {}
    if block.kind == "blend":
        whole = blend(block)
        part = (want.reference.facet or want.part) if whole["split"] else None
        shares = whole["mix"].get(part or "", whole["mix"].get("", {}))
        blending = {name: whole[name] for name in ("by", "until", "shuffle", "split")}
    read = _read(want.reader, {recipe.blocks[address]["format"] for address in shares})
    out: dict[str, Any] = {
        "source": want.reference.address, "part": part, "read": read, "length": want.length,
        "overlong": want.overlong, "loss": want.loss, "model": model.address,
    }  # fmt: skip
    decides = {
        "sources": [[data(recipe.blocks[name]), share] for name, share in sorted(shares.items())], **blending,
        "part": part, "read": read, "length": want.length, "overlong": want.overlong, "loss": want.loss,
        "tokenizer": model.entry["tokenizer"] or model.entry["from"], "template": model.entry["template"],
    }  # fmt: skip
    out["key"] = key_of(decides)
    out["facts"] = lock["edges"].get(out["key"])
    return out


def _read(reader: str, formats: set[str]) -> str:
    """What rows are read as. Plain text beside conversations is one, and each of its tokens is learned."""
    if reader == "prompts":
        return "prompt"
    if reader == "pairs":
        return "preference"
    return "text" if formats == {"text"} else "chat"
