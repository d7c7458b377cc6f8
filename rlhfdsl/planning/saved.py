"""Saved plans (`plan -o x.rhplan`) and bundles (`bundle -o x.rlhfb`): made, read, and held against their recipe.

    plan.json      what a run executes
    rlhf.lock      the facts that the plan rests on, and no others
    files/…        the recipe with everything that it includes; in a bundle also the local data that the lock pins
    record/…       on request, the metrics and hashes of a run of the bundle

A reader does not believe plan.json: the recipe, the lock and the target must give that plan again. Only its estimates
may be others, since they decide nothing and each version makes better ones.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.recipe import Recipe
from rlhfdsl.language.source import SourceFile
from rlhfdsl.planning import archive, checkpoints, lock
from rlhfdsl.planning.compile import compile
from rlhfdsl.planning.hardware import Target

PLAN, BUNDLE = "plan", "bundle"
LIMIT = 64 << 20  # bytes of local inputs that go into a bundle unless more is asked for
_FILES, _RECORD = "files/", "record/"
_TYPED = re.compile(r"-p \w+|--set( #\d+)?")  # sources that were typed, and stand among the options
_SHOWN = 6  # differences
_ESTIMATES = re.compile(r"time\b|stages\[\d+\]\.(memory|time|batch\.why)\b")  # and the reasons that name them
_TOKEN = re.compile(
    rb"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,}|xox[bap]-[\w-]{20,})"
)
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY")
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Saved:
    """A saved plan or bundle, as it was read. recipe: its path under the folder that `unfold` writes."""

    kind: str
    plan: Json
    locked: Json
    about: Mapping[str, Any]
    generator: str
    digest: str
    recipe: str
    files: Mapping[str, bytes]
    record: Mapping[str, bytes]  # of a run, by `STAGE/result.json` and `STAGE/metrics.jsonl`


def make(
    kind: str,
    recipe: Recipe,
    plan: Json,
    locked: Mapping[str, Any],
    target: Target,
    options: Mapping[str, Any],
    limit: int = LIMIT,
    record: Mapping[str, bytes] | None = None,
) -> bytes:
    """The bytes of a saved plan or, with `kind` BUNDLE, of a bundle with its local inputs of at most `limit` bytes.

    options: how the recipe was compiled: {"params", "profile", "sets", "fit"}. record: of a run. Equal arguments and
    files give equal bytes, wherever they lie. Raises UserError for facts that are missing, inputs that are too large,
    have changed or are named by an absolute path, and for anything that looks like a secret.
    """
    missing = lock.missing(plan)
    if missing:
        raise UserError("E0724", f"the plan lacks facts of {', '.join(address for _, address, _ in missing)}",
                        help="save a plan without --no-lock")  # fmt: skip
    for address, source in lock.scorers(plan) if kind == BUNDLE else ():
        raise UserError(
            "E0753", f"`{source['file']}` is Python, and a bundle holds no code", at=f"{address}.file",
            help="share `rlhf plan -o x.rhplan`, which pins the file's hash, and the file beside it",
        )  # fmt: skip
    for address, model in plan["models"].items() if kind == BUNDLE else ():
        if "path" in (model["from"] or {}) and checkpoints.pickles(model):
            raise UserError(
                "E0753", f"the weights of `{model['from']['path']}` are pickles, and a bundle holds none",
                at=f"{address}.from", help="save them as safetensors, or name a model of the hub",
            )  # fmt: skip
    folder = os.path.abspath(recipe.path.parent)
    found = {os.path.abspath(name): text.encode() for name, text in texts(recipe.sources).items()}
    found |= _inputs(plan, folder, limit) if kind == BUNDLE else {}
    root = os.path.commonpath([folder, *map(os.path.dirname, found)])
    files = {Path(path).relative_to(root).as_posix(): data for path, data in found.items()}
    keys = {(part, entry["key"]) for part, _, entry in lock.entries(plan)}
    parts = [part for part in ("edges", "models", "scorers") if part in locked]
    subset = {**locked, **{part: {k: v for k, v in locked[part].items() if (part, k) in keys} for part in parts}}
    about = {
        "recipe": Path(os.path.abspath(recipe.path)).relative_to(root).as_posix(),
        "options": dict(options),
        "target": {"price": target.price, "profile": list(target.profile) if target.profile else None},
    }
    entries = {"plan.json": _text(plan), lock.NAME: _text(subset, order=True)}
    entries |= {_FILES + name: data for name, data in files.items()}
    entries |= {_RECORD + name: data for name, data in (record or {}).items()}
    _check_secrets({**entries, archive.MANIFEST: _text(about)})
    return archive.pack(kind, plan["generator"], about, entries)


def texts(sources: Mapping[str, SourceFile]) -> dict[str, str]:
    """The files of a recipe by path, without what was typed beside it."""
    return {name: source.text for name, source in sources.items() if not _TYPED.fullmatch(name)}


def read(data: bytes, name: str) -> Saved:
    """A saved plan or bundle from its bytes. Raises UserError when it is none, or was changed."""
    held = archive.unpack(data, name)
    try:
        plan, locked = (json.loads(held.entries[entry]) for entry in ("plan.json", lock.NAME))
        recipe, options, target = (held.about[key] for key in ("recipe", "options", "target"))
        whole = held.kind in (PLAN, BUNDLE) and f"{_FILES}{recipe}" in held.entries and isinstance(plan, dict)
        whole = whole and {"params", "profile", "sets", "fit"} <= set(options) and {"price", "profile"} <= set(target)
    except (KeyError, ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise archive.unusable(name, "is neither a saved plan nor a bundle")
    files, record = (
        {entry.removeprefix(part): data for entry, data in held.entries.items() if entry.startswith(part)}
        for part in (_FILES, _RECORD)
    )
    if len(files) + len(record) + 2 != len(held.entries):
        raise archive.unusable(name, "holds files that do not belong to a saved plan or bundle")
    return Saved(held.kind, plan, locked, held.about, held.generator, held.digest, recipe, files, record)


def unfold(saved: Saved, folder: Path) -> Path:
    """Write the files to `folder`, which appears at once, or compare them with those there; returns the recipe's path.

    Raises UserError when the folder has other contents.
    """
    entries = {**saved.files, str(PurePosixPath(saved.recipe).parent / lock.NAME): _text(saved.locked, order=True)}
    if folder.exists():
        for name, data in entries.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != data:
                raise UserError("E0751", f"`{path}` is not the file of the bundle any more", place=str(path),
                                help=f"delete `{folder}`: it is written anew")  # fmt: skip
        return folder / saved.recipe
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    for name, data in entries.items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)
    partial.rename(folder)
    return folder / saved.recipe


def target_of(saved: Saved) -> Target:
    """The target that the plan was made for. Raises KeyError or TypeError for one that is none."""
    told, more = saved.plan["target"], saved.about["target"]
    profile = more["profile"]
    return Target(
        told["device"], told["gpu"], told["memory"], told["nodes"], told["gpus"], told["origin"],
        None if profile is None else (profile[0], profile[1]), more["price"], told["host"],
    )  # fmt: skip


def check(saved: Saved, recipe: Recipe, base: Path, name: str) -> None:
    """Hold the plan against its recipe, as this program compiles it. base: the folder of the plan's inputs.

    Raises UserError naming what differs.
    """
    try:
        target = target_of(saved)
    except (KeyError, TypeError) as error:
        raise archive.unusable(name, "has no target that could be read") from error
    known = checkpoints.of_recipe(recipe, base)
    made, found = compile(recipe, saved.locked, target, known=known, fit=bool(saved.about["options"]["fit"]))
    if made is None:
        why = next(d.message for d in found if d.severity == "error")
        raise other(saved, name, [f"its recipe has an error here: {why}"])
    here, there = dict(_leaves(made)), dict(_leaves(saved.plan))
    paths = [p for p in dict.fromkeys((*there, *here)) if there.get(p) != here.get(p)]
    paths = [p for p in paths if p != "generator" and not _ESTIMATES.match(p)]
    if paths:
        told = [f"{path}: {_value(there.get(path))} there, {_value(here.get(path))} here" for path in paths[:_SHOWN]]
        if len(paths) > _SHOWN:
            told.append(f"and {len(paths) - _SHOWN} more")
        raise other(saved, name, told)


def other(saved: Saved, name: str, differences: list[str]) -> UserError:
    """That this program does not make the plan in a file, and what it makes otherwise."""
    from rlhfdsl import __version__

    here = f"rlhfdsl {__version__}"
    maker = archive.shown(saved.generator)
    who = "this version makes another one" if maker == here else f"`{maker}` made it, and this is {here}"
    return UserError(
        "E0752", f"the plan in `{name}` is not the plan of its recipe: {who}; {'; '.join(differences)}", place=name,
        help=f"`rlhf bundle {name} --open FOLDER` unpacks it; plan its recipe anew there",
    )  # fmt: skip


def _inputs(plan: Json, folder: str, limit: int) -> dict[str, bytes]:
    """Every local file that the facts of the plan pin, by its absolute path."""
    pins: dict[str, Any] = {}
    for _, _, entry in lock.entries(plan):
        pins |= entry["facts"]["files"]
    total = sum(pin["bytes"] for pin in pins.values())
    if total > limit:
        name, pin = max(pins.items(), key=lambda item: int(item[1]["bytes"]))
        raise UserError(
            "E0753", f"the local inputs take {_mib(total)}, and a bundle takes {_mib(limit)}: `{name}` is "
            f"{_mib(pin['bytes'])}", place=name,
            help=f"--limit {-(-total >> 20) + 1} packs them; or share `rlhf plan -o x.rhplan` and the data on its own",
        )  # fmt: skip
    found = {}
    for change in lock.changes({"files": pins}, Path(folder), whole=True):
        raise UserError("E0725", str(change), place=change.name, help="`rlhf lock FILE` brings the lock up to date")
    for name in pins:
        if os.path.isabs(name):
            raise UserError("E0753", f"`{name}` is an absolute path, which leads elsewhere on another machine",
                            place=name, help="put it beside the recipe: from = \"./…\"")  # fmt: skip
        path = os.path.normpath(os.path.join(folder, name))
        found[path] = Path(path).read_bytes()
    return found


def _check_secrets(entries: Mapping[str, bytes]) -> None:
    """Refuse to pack what looks like a token, or the value of a secret of this environment."""
    values = {
        value.encode(): name for name, value in os.environ.items() if _SECRET_NAMES.search(name) and len(value) >= 8
    }
    for entry, data in entries.items():
        own = next((name for value, name in values.items() if value in data), None)
        text = entry.endswith((".rlhf", ".json", ".lock"))
        if own is not None or (text and _TOKEN.search(data)):
            what = f"the value of {own}" if own is not None else "an access token"
            help = "take it out and revoke it: `hf auth login` keeps the hub's token outside"
            raise UserError("E0755", f"`{entry.removeprefix(_FILES)}` holds {what}", place=entry, help=help)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def _value(value: Any) -> str:
    return archive.shown(json.dumps(value))


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _text(value: Any, *, order: bool = False) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=order) + "\n").encode()
