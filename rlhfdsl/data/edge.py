"""A data edge of the plan as rows that a stage can train on or generate from."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from rlhfdsl.data import codes, sources
from rlhfdsl.data.blends import Pool, mix, part_of
from rlhfdsl.data.formats import READS, Row, parse
from rlhfdsl.data.render import DROPPED, Item, Renderer
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.models.tokenizers import generation_settings, stop_ids
from rlhfdsl.planning.lock import changes, pinned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows that are rendered and tokenised in one call.
_CHUNK = 2000


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence. `loss[t]` says that token t is a target; the first token never is."""

    ids: list[int]
    loss: list[bool]


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse answer to one prompt, each as the whole sequence with the prompt in front."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with the opening of the answer. `key` is the hash of its turns, the same in every run."""

    ids: list[int]
    text: str
    key: str


@dataclass(slots=True)
class Store:
    """The tokenised rows of one source, packed: 5 bytes for each token where lists would take 40."""

    sequences: int  # of each row: 2 for pairs
    name: str
    read: int = 0
    rows: int = 0  # those in the part
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROPPED, 0))
    ids: array[int] = field(default_factory=lambda: array("i"))
    loss: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("q", [0]))
    truncated: bytearray = field(default_factory=bytearray)
    texts: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    pool: Pool = field(default_factory=Pool)

    def add(self, row: Row, item: Item) -> None:
        tokens = 0
        for ids, loss in item.sequences:
            self.ids.extend(ids)
            self.loss.extend(loss)
            self.ends.append(len(self.ids))
            tokens += len(ids)
        self.truncated.append(item.truncated)
        self.texts.append(item.text)
        self.keys.append(row.key)
        self.pool.tokens.append(tokens)
        self.pool.ranks.append(row.rank)

    def example(self, row: int, which: int = 0) -> Example:
        n = row * self.sequences + which
        start, end = self.ends[n], self.ends[n + 1]
        return Example(self.ids[start:end].tolist(), list(map(bool, self.loss[start:end])))

    def lengths(self, row: int) -> list[int]:
        first = row * self.sequences
        return [self.ends[n + 1] - self.ends[n] for n in range(first, first + self.sequences)]


class Rows(Sequence[Any]):
    """The rows of one epoch of an edge, not shuffled: `Example`, `Pair` or `Prompt` by what it reads."""

    def __init__(
        self,
        read: str,
        stores: Mapping[str, Store],
        picks: Sequence[tuple[str, int]],
        tokenizer: PreTrainedTokenizerBase,
        entries: Sequence[Mapping[str, Any]],
        base: Path,
    ) -> None:
        self.read = read
        self.stores = stores
        self.picks = picks
        self.tokenizer = tokenizer
        self._entries = entries
        self._base = base

    def __len__(self) -> int:
        return len(self.picks)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source, row = self.picks[index]
        store = self.stores[source]
        if self.read == "preference":
            return Pair(store.example(row, 0), store.example(row, 1))
        example = store.example(row)
        return Prompt(example.ids, store.texts[row], store.keys[row]) if self.read == "prompt" else example

    def files(self) -> dict[str, Mapping[str, Any]]:
        """Size and hash of each local file behind the rows. Each call reads the files once more."""
        found: dict[str, Mapping[str, Any]] = {}
        for entry in self._entries:
            found |= sources.files(entry, self._base)
        return found

    @cached_property
    def content(self) -> str:
        """`sha256:…` of every token, its loss mask and the order of rows: equal hashes make equal batches."""
        digest = hashlib.sha256()
        numbers = {address: number for number, address in enumerate(sorted(self.stores))}
        for address in numbers:
            store = self.stores[address]
            for part in (store.ends, store.ids, store.loss):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(memoryview(part).cast("B"))
        for source, row in self.picks:
            digest.update(row.to_bytes(8, "little") + numbers[source].to_bytes(4, "little"))
        return "sha256:" + digest.hexdigest()

    def fingerprint(self, chosen: Sequence[int]) -> str:
        """16 hex digits of the rows of a batch: two runs that have the same ones read the same tokens and masks."""
        digest = hashlib.sha256(self.content.encode())
        digest.update(array("q", chosen).tobytes())
        return digest.hexdigest()[:16]


def load_edge(
    plan: Mapping[str, Any], edge: Mapping[str, Any], base: Path, tokenizer: PreTrainedTokenizerBase
) -> Rows:
    """Read, split, render, tokenise and blend what an edge of the plan names.

    base: the folder that paths of the plan's inputs are relative to. tokenizer: of the edge's model, by
    `load_tokenizer`, with its template.
    Raises UserError for data that cannot be read as the edge reads it, and when no row is left.
    """
    entry = plan["models"][edge["model"]]
    renderer = Renderer(
        model=edge["model"],
        tokenizer=tokenizer,
        stops=tuple(stop_ids(tokenizer, generation_settings(entry, base, edge["model"]))),
        length=edge["length"],
        overlong=edge["overlong"],
        loss="all" if edge["read"] == "text" else edge["loss"],
    )
    blend = plan["blends"].get(edge["source"])
    shares = {edge["source"]: 1.0}
    if blend is not None:
        overrides = blend["mix"]
        shares = overrides.get(edge["part"]) or overrides[""]
    shares = {address: share for address, share in shares.items() if share > 0}
    split = blend["split"] if blend is not None else None
    entries = {address: _pinned(plan["data"][address], edge) for address in shares}
    stores = {
        address: _read(entries[address], address, edge, split, base, renderer) for address in shares
    }
    _check(edge, stores)
    if len(stores) == 1:
        ((address, store),) = stores.items()
        picks = [(address, row) for row in range(len(store.keys))]
    else:
        pools = {address: store.pool for address, store in stores.items()}
        picks = mix(pools, shares, blend["by"], blend["until"])
    if not picks:
        why = f"the shares leave no whole row in {_place(edge)}"
        raise _nothing(edge, stores, codes.NOTHING_LEFT, why, edge["source"])
    rows = Rows(edge["read"], stores, picks, tokenizer, list(entries.values()), base)
    locked = (edge.get("facts") or {}).get("content")
    if locked is not None and rows.content != locked:
        for change in changes(edge["facts"], base, whole=True):  # since the files were compared, right before
            raise UserError(codes.OTHER_FILE, str(change), at=edge["source"], place=str(base / change.name),
                            help="it changed as the stage began: put the locked file back, or plan again")  # fmt: skip
        raise UserError(
            codes.OTHER_ROWS,
            f"the tokens of {edge['source']} are not those that were locked: {locked} then, {rows.content} now",
            at=edge["source"],
            place=", ".join(store.name for store in stores.values()),
            help="another version of tokenizers, transformers or datasets renders them otherwise; rlhf.lock lists the "
            "versions it was made with. `rlhf lock --upgrade FILE` takes what is read now",
        )
    return rows


def _pinned(entry: Mapping[str, Any], edge: Mapping[str, Any]) -> Mapping[str, Any]:
    """A `data` entry with the commit that the edge's facts hold its repository to."""
    return {**entry, "from": pinned(entry["from"], edge.get("facts"))}


def _read(
    entry: Mapping[str, Any],
    address: str,
    edge: Mapping[str, Any],
    split: Mapping[str, float] | None,
    base: Path,
    renderer: Renderer,
) -> Store:
    """The tokenised rows of one source that are in the edge's part."""
    if edge["read"] not in _reads(entry["format"], renderer.loss):
        takes = ", ".join(kind for kind, reads in READS.items() if edge["read"] in reads)
        raise UserError(
            codes.UNREADABLE_FORMAT,
            f"`{address}` has the format {entry['format']}, which is not read as {edge['read']}",
            at=f"{address}.format",
            place=sources.name_of(entry),
            help=f"this stage reads the formats {takes}"
            + ("; text is for loss = all" if entry["format"] == "text" else ""),
        )
    store = Store(2 if edge["read"] == "preference" else 1, sources.name_of(entry))
    for read in _chunks(parse(sources.open_source(address, entry, base), entry)):
        chunk = [row for row in read if split is None or part_of(row.key, split) == edge["part"]]
        store.read += len(read)
        store.rows += len(chunk)
        for row, item in zip(chunk, _items(chunk, entry["format"], edge["read"], renderer), strict=True):
            if isinstance(item, str):
                store.dropped[item] += 1
            else:
                store.add(row, item)
    return store


def _reads(format: str, loss: str | None) -> tuple[str, ...]:
    """What can be read from a format. Plain text is a conversation when every token is learned."""
    return (*READS[format], "chat") if format == "text" and loss == "all" else READS[format]


def _items(rows: Sequence[Row], format: str, read: str, renderer: Renderer) -> list[Item | str]:
    if read == "preference":
        return renderer.pairs(rows)
    if read == "prompt":
        return renderer.prompts(rows)
    if format == "text":
        return renderer.plain(rows)
    return renderer.chats(rows, every_turn=format == "chat")


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _check(edge: Mapping[str, Any], stores: Mapping[str, Store]) -> None:
    """Every source must have a row left: a share of nothing cannot be kept."""
    empty = {address: store for address, store in stores.items() if not store.keys}
    if len(empty) == len(stores):
        raise _nothing(edge, empty, codes.NOTHING_LEFT, f"no row is left in {_place(edge)}", next(iter(empty)))
    for address, store in empty.items():
        why = f"`{address}` has a share of {_place(edge)}, and nothing to give"
        raise _nothing(edge, {address: store}, codes.EMPTY_SHARE, why, address)


def _place(edge: Mapping[str, Any]) -> str:
    return f"{edge['source']}, part {edge['part']}" if edge["part"] else str(edge["source"])


def _nothing(edge: Mapping[str, Any], stores: Mapping[str, Store], code: str, why: str, at: str) -> UserError:
    """What `why` says, with the rows that each source had and why they were dropped."""
    told = []
    for address, store in stores.items():
        count = f"{store.read} row" if store.read == 1 else f"{store.read} rows"
        part = f", {store.rows or 'none'} of them in the part" if edge["part"] else ""
        dropped = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in store.dropped.items() if n)
        told.append(f"`{address}` has {count}{part}" + (f" (dropped: {dropped})" if dropped else ""))
    worst = max(DROPPED, key=lambda reason: sum(store.dropped[reason] for store in stores.values()))
    length = f"raise `length` from {edge['length']} tokens"
    help = {
        "too_long": length,
        "no_answer": f"{length}, or give the rows an answer",
        "tie": f"chosen and rejected must differ; where they do so after {edge['length']} tokens, raise `length`",
        "empty": "look at the rows: prompts and answers must say something",
    }[worst]
    if not all(store.rows for store in stores.values()):
        help = "give the part a larger share, or the source more rows"
    elif edge["read"] == "prompt" and worst == "too_long":
        help = f"raise `rollout.prompt` from {edge['length']} tokens, or cut them: `overlong = cut`"
    files = ", ".join(store.name for store in stores.values())
    return UserError(code, f"{why}: {'; '.join(told)}", at=at, place=files, help=help)
