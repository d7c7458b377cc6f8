"""What the lock keeps of a data edge: counts, lengths, hashes of the files, one rendered sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rlhfdsl.data.edge import Example, Pair, Prompt, Rows, load_edge
from rlhfdsl.data.render import DROPPED
from rlhfdsl.data.sources import pin_data
from rlhfdsl.models.tokenizers import load_tokenizer

_SAMPLE = 400  # characters of a piece of the sample


def edge_facts(plan: Mapping[str, Any], edge: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """EDGEFACTS of an edge of the plan, with paths relative to `base`. Raises what `load_edge` raises."""
    tokenizer = load_tokenizer(plan["models"][edge["model"]], base, edge["model"])
    blend = plan["blends"].get(edge["source"])
    addresses = {edge["source"]} if blend is None else {name for mix in blend["mix"].values() for name in mix}
    hub = {}
    for address in sorted(addresses):
        source = plan["data"][address]["from"]
        if "hub" in source and source["hub"] not in hub:
            hub[source["hub"]] = pin_data(address, source)
    facts = facts_of(load_edge(plan, {**edge, "facts": {"hub": hub}}, base, tokenizer))
    return {**facts, "hub": hub} if hub else facts


def facts_of(rows: Rows) -> dict[str, Any]:
    """EDGEFACTS of loaded rows, whose local files are read once more for their hashes.

    rows: rows of the part, before anything is dropped. used: rows of one epoch, after dropping and blending,
    repeats counted. tokens, truncated, lengths: over what is used; the two sequences of a pair count as two
    lengths.
    """
    lengths = sorted(n for source, row in rows.picks for n in rows.stores[source].lengths(row))
    by_name: dict[str, dict[str, int]] = {}
    for address, store in rows.stores.items():
        counts = by_name.setdefault(store.name, {"rows": 0, "used": 0})
        counts["rows"] += store.rows
        counts["used"] += sum(source == address for source, _ in rows.picks)
    return {
        "rows": sum(store.rows for store in rows.stores.values()),
        "used": len(rows),
        "tokens": sum(lengths),
        "truncated": sum(rows.stores[source].truncated[row] for source, row in rows.picks),
        "dropped": {reason: sum(s.dropped[reason] for s in rows.stores.values()) for reason in DROPPED},
        "sources": by_name,
        "lengths": {
            "max": lengths[-1],
            "mean": round(sum(lengths) / len(lengths), 2),
            **{f"p{p}": _percentile(lengths, p) for p in (50, 90, 99)},
        },
        "sample": _sample(rows),
        "content": rows.content,
        "files": {name: dict(pins) for name, pins in sorted(rows.files().items())},
    }


def _percentile(ordered: Sequence[int], p: int) -> int:
    """The nearest-rank percentile: the smallest value that at least p % of all do not exceed."""
    return ordered[math.ceil(len(ordered) * p / 100) - 1]


def _sample(rows: Rows) -> list[dict[str, Any]]:
    """The first row as pieces of text; of a pair: prompt, chosen answer, rejected answer."""
    first = rows[0]
    if isinstance(first, Prompt):
        return [_piece(rows, first.ids, False)]
    if isinstance(first, Pair):
        return _pieces(rows, first.chosen) + [p for p in _pieces(rows, first.rejected) if p["loss"]]
    return _pieces(rows, first)


def _pieces(rows: Rows, example: Example) -> list[dict[str, Any]]:
    found = []
    for loss, group in groupby(zip(example.ids, example.loss, strict=True), key=lambda pair: pair[1]):
        found.append(_piece(rows, [token for token, _ in group], loss))
    return found


def _piece(rows: Rows, ids: Sequence[int], loss: bool) -> dict[str, Any]:
    text = rows.tokenizer.decode(ids, skip_special_tokens=False)
    half = _SAMPLE // 2
    return {"text": text if len(text) <= _SAMPLE else f"{text[:half]} … {text[-half:]}", "loss": loss}
