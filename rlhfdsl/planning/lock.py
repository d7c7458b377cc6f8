"""`rlhf.lock`: the facts of data edges and models, kept beside the recipe so that planning needs no network.

    {"version": 1, "edges": {key: facts}, "models": {key: facts}}

A key is the hash of what decides the facts (sources, tokenizer, template, lengths), so a changed recipe asks
for new facts and never meets old ones. Nothing of the hardware is in the lock.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError

VERSION = 1
NAME = "rlhf.lock"
WHOLE = 16 << 20  # bytes: larger files are pinned by their ends, since every plan looks at every pin
END = 1 << 20
Facts = dict[str, Any]


def empty() -> dict[str, Any]:
    """A lock without facts."""
    return {"version": VERSION, "edges": {}, "models": {}}


def canonical(value: Any) -> str:
    """JSON without freedom: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def key_of(value: Any) -> str:
    """`sha256:…` of a value's canonical JSON."""
    return "sha256:" + hashlib.sha256(canonical(value).encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """The lock at `path`, or an empty one when there is no file. Raises UserError when it is not a lock."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty()
    except (OSError, ValueError) as error:
        raise _unusable(path, f"cannot be read: {error}") from error
    if not isinstance(value, dict) or value.get("version") != VERSION:
        found = value.get("version") if isinstance(value, dict) else None
        raise _unusable(path, f"has version {found}, and this program reads version {VERSION}")
    if not all(isinstance(value.get(part), dict) for part in ("edges", "models")):
        raise _unusable(path, "lacks `edges` or `models`")
    return value


def _unusable(path: Path, why: str) -> UserError:
    help = "delete it: the next plan makes it anew"
    return UserError("E0720", f"`{path.name}` {why}", place=str(path), help=help)


def write(path: Path, lock: dict[str, Any]) -> None:
    """Write the lock by a rename, so that no reader sees half a file."""
    text = json.dumps(lock, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def pin(path: Path) -> Facts:
    """What a file is known by: its size and the sha256 of it all, or of a large one the sha256 of its ends.

    A checkpoint of safetensors has its header, which lists every tensor, at its beginning.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return {"bytes": size, "sha256": "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()}
        ends = hashlib.sha256(file.read(END))
        file.seek(-END, os.SEEK_END)
        ends.update(file.read(END))
    return {"bytes": size, "ends": "sha256:" + ends.hexdigest()}


def stale(facts: Facts, base: Path, seen: dict[Path, Facts] | None = None) -> list[str]:
    """The files of some facts that are gone or have other bytes now. Paths are relative to `base`.

    seen: pins of files that were read before, which are added to, so that no file is read twice.
    """
    seen = {} if seen is None else seen
    return [name for name, pinned in facts.get("files", {}).items() if not _same(base / name, pinned, seen)]


def drop_stale(lock: dict[str, Any], plan: dict[str, Any], base: Path) -> list[str]:
    """Take the facts out of `lock` that a plan asks for and whose files have changed; returns those files."""
    changed: dict[str, None] = {}
    seen: dict[Path, Facts] = {}
    for part, entries in (("edges", edges(plan)), ("models", iter(plan["models"].items()))):
        for _, entry in entries:
            old = stale(lock[part].get(entry["key"], {}), base, seen)
            if old:
                del lock[part][entry["key"]]
                changed |= dict.fromkeys(old)
    return list(changed)


def _same(path: Path, pinned: Facts, seen: dict[Path, Facts]) -> bool:
    try:
        if path.stat().st_size != pinned["bytes"]:
            return False
        if path not in seen:
            seen[path] = pin(path)
    except OSError:
        return False
    return seen[path] == pinned


def edges(plan: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every data edge of a plan with its address, `stage.sft.train`, in the order of the plan."""
    for stage in plan["stages"]:
        for name, edge in stage["edges"].items():
            if edge is not None:
                yield f"{stage['address']}.{name}", edge


def missing(plan: dict[str, Any]) -> tuple[list[tuple[str, Facts]], list[tuple[str, Facts]]]:
    """The edges and the models of a plan that have no facts yet, each with its address; equal keys come
    once."""
    found: tuple[list[tuple[str, Facts]], list[tuple[str, Facts]]] = ([], [])
    for into, entries in ((found[0], edges(plan)), (found[1], iter(plan["models"].items()))):
        seen: set[str] = set()
        for address, entry in entries:
            if entry["facts"] is None and entry["key"] not in seen:
                seen.add(entry["key"])
                into.append((address, entry))
    return found
