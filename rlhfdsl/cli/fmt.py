"""`rlhf fmt`: recipes in the one canonical form, comments kept."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhfdsl.cli.common import BUG, ERROR, OK, USAGE, held, say, show
from rlhfdsl.language.files import write_whole
from rlhfdsl.language.format import NotEquivalent, format_text
from rlhfdsl.language.source import SourceFile, read

HELP = "format recipes"


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf fmt`."""
    parser.add_argument(
        "files", nargs="*", default=["."], metavar="FILE", help="recipes or folders of them; - is stdin (default: .)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file would change")
    parser.add_argument("--diff", action="store_true", help="write nothing; print what would change")


def run(args: argparse.Namespace) -> int:
    """Format each file in its place, stdin to stdout; a file with a syntax error stays as it is."""
    code = OK
    changed = total = 0
    for path in _files(args.files):
        total += 1
        found, problems = read(*held(path))
        source = found if found is not None else SourceFile(path.as_posix(), "")
        try:
            text, wrong = (None, []) if problems else format_text(source)
        except NotEquivalent as bug:
            say(f"rlhf: {bug}; nothing was written")
            return BUG
        if text is None:
            show([*problems, *wrong], {source.name: source})
            code = ERROR
            continue
        same = path != Path("-") and path.read_bytes() == text.encode()
        if args.diff and text != source.text:
            import difflib

            lines = difflib.unified_diff(
                source.text.splitlines(keepends=True), text.splitlines(keepends=True), source.name, source.name
            )
            sys.stdout.writelines(line if line.endswith("\n") else line + "\n" for line in lines)
        if path == Path("-"):
            if not (args.check or args.diff):
                sys.stdout.write(text)
            changed += text != source.text
        elif not same:
            changed += 1
            if args.check:
                print(f"would change {path}")
            elif not args.diff:
                write_whole(path, text)
                print(f"wrote {path}")
    if not total:
        say("rlhf: no .rlhf file here")
        return USAGE
    return ERROR if args.check and changed else code


def _files(names: list[str]) -> list[Path]:
    """The files that are named, and the recipes below the folders that are."""
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        inside = path.is_dir() and name != "-"
        hidden = (p for p in sorted(path.rglob("*.rlhf"))) if inside else iter(())
        paths += [p for p in hidden if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        paths += [] if inside else [path]
    return list(dict.fromkeys(paths))
