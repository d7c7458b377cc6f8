"""Where a model or tokenizer of the recipe lies, the pins of its local files, and what to say when it is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhfdsl.data import codes
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.planning import lock


def located(source: Mapping[str, Any], base: Path) -> tuple[str, dict[str, Any], str | None]:
    """A directory or hub id, the options to load it with, and its name in the recipe if it is a directory."""
    if "path" in source:
        return str(base / source["path"]), {}, source["path"]
    return source["hub"], {"revision": source.get("revision")}, None


def pinned(entry: Mapping[str, Any], setting: str) -> dict[str, Any]:
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


def setting_at(address: str | None, setting: str) -> str | None:
    """The recipe address of a model's setting."""
    return f"{address}.{setting}" if address else None


def no_directory(named: str, directory: Path, at: str | None) -> UserError:
    """What to say of a directory that the recipe names and that is not there, or is a file."""
    there = [p.name for p in directory.parent.iterdir() if p.is_dir()] if directory.parent.is_dir() else []
    near = difflib.get_close_matches(directory.name, there, n=1)
    is_file = directory.is_file()
    return UserError(
        codes.MODEL_MISSING,
        f"`{named}` is a file, not the directory of a model" if is_file else f"there is no directory `{named}`",
        at=at,
        place=named,
        help=f"did you mean `{near[0]}` beside it?"
        if near
        else "paths are relative to the recipe; a hub id is written without ./",
    )


def refuse_code(what: str, at: str | None, error: Exception) -> None:
    """Raise UserError where transformers would have to run code of the model's repository. what: which part of it."""
    if "trust_remote_code" in str(error):
        raise UserError(
            codes.CONFIG,
            f"{what} needs code of its own repository, and such code is never run",
            at=at,
            help="take a model of which transformers itself has the code; many have a version with a name in -hf",
        ) from error


def hub_model(source: str, at: str | None, error: Exception) -> UserError:
    """What to say of a model that the hub does not give."""
    return UserError(
        codes.HUB_MODEL,
        f"`{source}` cannot be read from the Hugging Face hub",
        at=at,
        place=source,
        help=f"{first_line(error).rstrip('.')}. Run once with a network (HF_HUB_OFFLINE unset, `hf auth login` for a "
        'gated model), or download it and name the directory: from = "./…"',
    )
