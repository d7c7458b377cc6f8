"""`rlhf import`: a command or configuration of another tool as a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhfdsl.cli.common import OK, fail, say
from rlhfdsl.language.files import write_whole
from rlhfdsl.language.foreign import Unreadable, convert, read_command
from rlhfdsl.language.foreign.tools import TOOLS

HELP = "turn another tool's command or YAML into a recipe"


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf import`."""
    parser.add_argument("file", metavar="FILE", help="a shell script, a command line or YAML; - is stdin")
    tools = {name.lower(): name for name in TOOLS}
    parser.add_argument(
        "--tool", type=lambda name: tools.get(name.lower(), name), choices=tuple(TOOLS),
        help="whose it is (default: told from what it says)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", help="where to (default: stdout)")


def run(args: argparse.Namespace) -> int:
    """Print or write the recipe; a note for each setting that did not go over stands in it, and on stderr."""
    path = Path(args.file)
    try:
        text = sys.stdin.read() if args.file == "-" else path.read_text(encoding="utf-8-sig")
        imported = convert(read_command(text, args.tool), "imported" if args.file == "-" else path.stem)
    except UnicodeDecodeError:
        fail(f"{args.file} is not UTF-8 text")
    except Unreadable as error:
        fail(f"{args.file}: {error}")
    for line, name, why in imported.notes:
        say(f"{args.file}:{line}: {name}: {why}" if line else f"{name}: {why}")
    if args.output is None:
        print(imported.text, end="")
    elif Path(args.output).exists():
        fail(f"`{args.output}` exists already")
    else:
        write_whole(Path(args.output), imported.text)
        print(f"wrote {args.output}")
    return OK
