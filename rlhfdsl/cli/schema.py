"""`rlhf schema`: the JSON schemas of the recipe, and of the files that other programs read."""

from __future__ import annotations

import argparse
import json
import sys

from rlhfdsl.cli.common import OK, fail
from rlhfdsl.language.resources import resource
from rlhfdsl.language.schema import table
from rlhfdsl.language.suggest import listed, nearest

HELP = "print a JSON schema: of recipes, plans, locks"


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf schema`."""
    parser.add_argument("name", nargs="?", default="recipe", metavar="NAME", help="recipe (default), plan, lock …")
    parser.add_argument("--list", action="store_true", help="say which there are")


def run(args: argparse.Namespace) -> int:
    """Print a schema of grammar/; the recipe's with the definitions of the file that it refers to."""
    paths = {path.name.partition(".")[0]: path for path in sorted(resource("grammar").glob("*.schema.json"))}
    if args.list:
        width = max(map(len, paths))
        for name, path in paths.items():
            print(f"{name:<{width}}  {json.loads(path.read_text(encoding='utf-8')).get('title', '')}".rstrip())
        return OK
    if args.name not in paths:
        near = nearest(args.name, paths)
        help = f"did you mean {listed(near)}?" if near else f"there is {listed(paths)}"
        fail(f"there is no schema `{args.name}`; {help}")
    if args.name == "recipe":
        print(json.dumps(table(), indent=2, ensure_ascii=False))
    else:
        sys.stdout.write(paths[args.name].read_text(encoding="utf-8"))
    return OK
