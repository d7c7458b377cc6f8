"""`rlhf cache`: what runs have left on the disk, how much it takes, what may go, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfdsl.cli.common import ERROR, OK, fail, say
from rlhfdsl.language.terminal import visible

if TYPE_CHECKING:
    from rlhfdsl.running.cache import Entry

HELP = "what runs left behind: list it, show its size, remove what was replaced, verify it"
_TOLD = {
    "current": "finished", "other": "finished, of another plan", "aside": "replaced", "partial": "not finished",
    "inputs": "inputs of a bundle", "models": "models from scratch",
}  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf cache`."""
    parser.add_argument(
        "action", choices=("ls", "du", "gc", "verify"),
        help="ls: every stage; du: sizes; gc: what was replaced by a later run (removes it with --yes); verify: hashes",
    )  # fmt: skip
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="a run, or runs (default: runs)")
    parser.add_argument("--keep", type=int, default=0, metavar="N", help="gc: keep the newest N replaced of each stage")
    parser.add_argument("--partial", action="store_true", help="gc: unfinished stages with their checkpoints as well")
    parser.add_argument("--yes", action="store_true", help="gc: remove it")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    """Look, and with `gc --yes` remove."""
    from rlhfdsl.running import cache

    if (args.keep or args.partial or args.yes) and args.action != "gc":
        fail("--keep, --partial and --yes are for `rlhf cache gc`")
    if args.keep < 0:
        fail("--keep takes a number from 0")
    if not args.folder.is_dir():
        fail(f"there is no folder {args.folder}; name a run, or the folder of your runs")
    found = cache.entries(args.folder)
    if not found:
        say(f"no run in {args.folder}")
    return {"ls": _list, "du": _sizes, "gc": _collect, "verify": _verify}[args.action](args, found)


def _list(args: argparse.Namespace, found: list[Entry]) -> int:
    if args.format == "json":
        return _json([_plain(entry) for entry in found])
    rows = [
        (str(entry.folder), _TOLD[entry.state], _size(entry.bytes), _age(entry.changed), (entry.key or "")[7:19])
        for entry in found
    ]
    _table(rows)
    return OK


def _sizes(args: argparse.Namespace, found: list[Entry]) -> int:
    sums: dict[tuple[str, str], int] = {}
    for entry in found:
        place = str(entry.run), entry.state
        sums[place] = sums.get(place, 0) + entry.bytes
    if args.format == "json":
        return _json([{"run": run, "state": state, "bytes": size} for (run, state), size in sums.items()])
    _table([(run, _TOLD[state], _size(size)) for (run, state), size in sums.items()])
    print(f"{_size(sum(sums.values()))} in all")
    return OK


def _collect(args: argparse.Namespace, found: list[Entry]) -> int:
    from rlhfdsl.running import cache

    chosen, alive = cache.garbage(found, keep=args.keep, partial=args.partial)
    if args.yes:
        for entry in chosen:
            cache.remove(entry)
    if args.format == "json":
        return _json([_plain(entry) | {"removed": args.yes} for entry in chosen])
    _table([(str(entry.folder), _TOLD[entry.state], _size(entry.bytes), _age(entry.changed)) for entry in chosen])
    for entry in alive:
        say(f"{entry.folder} was written to less than an hour ago and may be running; it stays")
    total = _size(sum(entry.bytes for entry in chosen))
    told = f"{total} removed" if args.yes else f"{total} could go; remove it with --yes"
    print(told if chosen else "nothing to remove")
    return OK


def _verify(args: argparse.Namespace, found: list[Entry]) -> int:
    from rlhfdsl.running import cache

    looked = [(entry, cache.damage(entry)) for entry in found if entry.state not in ("inputs", "models")]
    if args.format == "json":
        _json([_plain(entry) | {"damage": wrong} for entry, wrong in looked])
    else:
        words = {None: "whole", "": "nothing to compare with"}
        _table([(str(entry.folder), words.get(wrong) or str(wrong)) for entry, wrong in looked])
    return ERROR if any(wrong for _, wrong in looked) else OK


def _plain(entry: Entry) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(entry).items()}


def _json(value: list[dict[str, Any]]) -> int:
    print(json.dumps(value, indent=1))
    return OK


def _table(rows: list[tuple[str, ...]]) -> None:
    cleaned = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cleaned, strict=True)]
    for row in cleaned:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def _age(changed: float) -> str:
    minutes = max(0.0, time.time() - changed) / 60
    if minutes < 120:
        return f"{minutes:.0f} min ago"
    return f"{minutes / 60:.0f} h ago" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days ago"
