"""`rlhf fix`: the mistakes that have one way out, mended in the file."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from rlhfdsl.cli.common import ERROR, OK, held, show
from rlhfdsl.language.files import write_whole
from rlhfdsl.language.fixes import fix
from rlhfdsl.language.source import read

HELP = "apply the fixes that are safe"


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf fix`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="a .rlhf recipe; - is stdin")
    parser.add_argument("--code", metavar="CODE", help="mend mistakes of this code only")
    parser.add_argument("--diff", action="store_true", help="write nothing; print what would change")


def run(args: argparse.Namespace) -> int:
    """Mend each file, stdin to stdout; what is left is shown, and with an error left it exits 1."""
    code = OK
    for name in args.files:
        path = Path(name)
        at, overlay = held(path)
        found, _ = read(at, overlay)
        before = found.text if found is not None else ""
        text, mended, left = fix(at, args.code.upper() if args.code else None, overlay)
        for diagnostic in mended:
            print(f"{at}: {diagnostic.code} {diagnostic.message}: {diagnostic.fixes[0].title}", file=sys.stderr)
        if text is not None and args.diff:
            lines = difflib.unified_diff(
                before.splitlines(keepends=True), text.splitlines(keepends=True), name, name
            )
            sys.stdout.writelines(lines)
        elif name == "-":
            sys.stdout.write(before if text is None else text)
        elif text is not None:
            write_whole(path, text)
        show(left.diagnostics, left.sources)
        if not args.diff and name != "-":
            print(f"{path}: {len(mended)} mended, {len(left.diagnostics)} left")
        code = ERROR if any(d.severity == "error" for d in left.diagnostics) else code
    return code
