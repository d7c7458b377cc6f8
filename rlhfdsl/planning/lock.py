"""`rlhf.lock`: the facts of data edges and models, kept beside the recipe so that planning needs no network.

    {"version": 1, "edges": {key: facts}, "models": {key: facts}, "scorers": {key: facts},
     "code": {"semantics", "packages"}}

A key is the hash of what decides the facts (sources, tokenizer, template, lengths), so a changed recipe asks
for new facts and never meets old ones. Nothing of the hardware is in the lock.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.files import write_whole

VERSION = 1
NAME = "rlhf.lock"
SEMANTICS = 1  # raise it when the same recipe and data give other rows, another plan or another result than before
PACKAGES = ("rlhfdsl", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy")
WHOLE = 16 << 20  # bytes: of larger files a plan looks at the ends alone, and a run at everything
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
    if (value.get("code") or {}).get("semantics", SEMANTICS) != SEMANTICS:
        value["edges"], value["models"], value["scorers"] = {}, {}, {}  # they say what another program meant
    return value


def _unusable(path: Path, why: str) -> UserError:
    help = "delete it: the next plan makes it anew"
    return UserError("E0720", f"`{path.name}` {why}", place=str(path), help=help)


def write(path: Path, lock: dict[str, Any]) -> None:
    """Write the lock. Raises OSError that names it."""
    text = json.dumps(lock, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text)


def pin(path: Path) -> Facts:
    """What a file is known by: its size and sha256; a large one is known by the sha256 of its ends as well.

    A checkpoint of safetensors has its header, which lists every tensor, at its beginning.
    """
    pinned = glance(path)
    if "ends" in pinned:
        with path.open("rb") as file:
            pinned["sha256"] = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    return pinned


def glance(path: Path) -> Facts:
    """The part of a file's pin that takes no time: of a large one the size and the sha256 of its ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return {"bytes": size, "sha256": "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()}
        ends = hashlib.sha256(file.read(END))
        file.seek(-END, os.SEEK_END)
        ends.update(file.read(END))
    return {"bytes": size, "ends": "sha256:" + ends.hexdigest()}


@dataclass(frozen=True, slots=True)
class Change:
    """A file that is not the one that was locked. `found` is None when it is gone or cannot be read."""

    name: str
    locked: Facts
    found: Facts | None

    def __str__(self) -> str:
        if self.found is None:
            return f"`{self.name}` is gone since it was locked ({known_by(self.locked)})"
        key = next((k for k in ("sha256", "ends") if k in self.locked and k in self.found), "bytes")
        of = " of its ends" if key == "ends" else ""
        then, now = known_by(self.locked, key), known_by(self.found, key)
        return f"`{self.name}` changed since it was locked: {then} then, {now} now{of}"


def known_by(pinned: Facts, key: str = "sha256") -> str:
    """A pin in words: `4 bytes, sha256:…`."""
    found = f"{pinned['bytes']} bytes"
    return f"{found}, {pinned[key]}" if key != "bytes" and key in pinned else found


def changes(facts: Facts, base: Path, seen: dict[Path, Facts] | None = None, *, whole: bool = False) -> list[Change]:
    """The files of some facts that are gone or have other bytes now. Paths are relative to `base`.

    seen: what was read of files before, which is added to, so that no file is read twice.
    whole: read large files from end to end, as before their data are used; else their ends.
    """
    seen = {} if seen is None else seen
    found = (_change(name, pinned, base / name, seen, whole) for name, pinned in facts.get("files", {}).items())
    return [change for change in found if change is not None]


def drop_stale(lock: dict[str, Any], plan: dict[str, Any], base: Path) -> list[Change]:
    """Take the facts out of `lock` that a plan asks for and whose files have changed; returns those files."""
    changed: dict[str, Change] = {}
    seen: dict[Path, Facts] = {}
    for part, _, entry in entries(plan):
        old = changes(lock.get(part, {}).get(entry["key"], {}), base, seen)
        if old:
            del lock[part][entry["key"]]
            changed |= {change.name: change for change in old}
    return list(changed.values())


def forget(lock: dict[str, Any], plan: dict[str, Any]) -> None:
    """Take all the facts that a plan asks for out of `lock`."""
    for part, _, entry in entries(plan):
        lock.get(part, {}).pop(entry["key"], None)


def refusal(stale: list[Change], missing: list[str]) -> UserError | None:
    """Why a lock cannot be used as it is; None when it can."""
    help = "`rlhf lock FILE` brings the lock up to date"
    if stale:
        more = f" (and {len(stale) - 1} more files)" if len(stale) > 1 else ""
        return UserError("E0725", f"{stale[0]}{more}", place=stale[0].name, help=help)
    if missing:
        return UserError("E0724", f"{NAME} lacks {', '.join(missing)}", place=NAME, help=help)
    return None


def _change(name: str, pinned: Facts, path: Path, seen: dict[Path, Facts], whole: bool) -> Change | None:
    try:
        if path not in seen or (whole and "sha256" not in seen[path]):
            seen[path] = pin(path) if whole else glance(path)
    except OSError:
        return Change(name, pinned, None)
    found = seen[path]
    same = "sha256" in pinned and all(pinned.get(key) == found[key] for key in found)
    return None if same else Change(name, pinned, found)


def made_here(lock: Mapping[str, Any]) -> list[str]:
    """What differs between the program and packages that made a lock and those here, as sentences; [] for none."""
    code = lock.get("code")
    if code is None:
        return []
    here, then = _public_versions(), code["packages"]
    found = [f"{name} {then[name]} then, {here[name]} now" for name in here if then.get(name, here[name]) != here[name]]
    if code["semantics"] != SEMANTICS:
        found.insert(0, f"semantics {code['semantics']} then, {SEMANTICS} now")
    return found


def stamp(lock: dict[str, Any]) -> None:
    """Note in the lock what makes its facts: this program's semantics and the versions of the packages."""
    lock["code"] = {"semantics": SEMANTICS, "packages": _public_versions()}


def _public_versions() -> dict[str, str]:
    """Versions without the build's suffix (`+cu128`), which says what the machine is."""
    return {name: version.partition("+")[0] for name, version in packages().items()}


def packages(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The installed versions of the packages that rows, weights or metrics depend on; nothing is imported."""
    import importlib.metadata  # slow, and no plan needs it

    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def pinned(source: Mapping[str, Any], facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """A `from` of the plan with the commit that the facts lock it to, where they do."""
    repo = ((facts or {}).get("hub") or {}).get(source.get("hub"))
    return {**source, "revision": repo["revision"]} if repo else dict(source)


def edges(plan: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every data edge of a plan with its address, `stage.sft.train`, in the order of the plan."""
    for stage in plan["stages"]:
        for name, edge in stage["edges"].items():
            if edge is not None:
                yield f"{stage['address']}.{name}", edge


def scorers(plan: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every function that scores answers in a plan, with the address of its block."""
    for stage in plan["stages"]:
        for source in (stage["settings"].get("reward") or {"sources": ()})["sources"]:
            if source["kind"] == "function":
                yield f"scorer.{source['name']}", source


def entries(plan: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(part of the lock, address, entry of the plan) of everything whose facts a lock holds: models first."""
    yield from (("models", address, entry) for address, entry in plan["models"].items())
    yield from (("edges", address, entry) for address, entry in edges(plan))
    yield from (("scorers", address, entry) for address, entry in scorers(plan))


def missing(plan: dict[str, Any]) -> list[tuple[str, str, Facts]]:
    """Those of `entries` that have no facts yet; equal keys come once."""
    found: dict[tuple[str, str], tuple[str, str, Facts]] = {}
    for part, address, entry in entries(plan):
        if entry["facts"] is None:
            found.setdefault((part, entry["key"]), (part, address, entry))
    return list(found.values())
