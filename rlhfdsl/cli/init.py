"""`rlhf init`: a recipe to start from, with the data files that it names."""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

from rlhfdsl.cli.common import OK, fail, show
from rlhfdsl.language import Recipe, Source, load
from rlhfdsl.language.files import write_whole
from rlhfdsl.language.resources import resource
from rlhfdsl.language.suggest import listed, nearest

HELP = "write a recipe to start from"
_DEFAULT = "quickstart"


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf init`."""
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="where to (default: here)")
    parser.add_argument(
        "--template", default=_DEFAULT, metavar="NAME", help=f"which one (default: {_DEFAULT})"
    )
    parser.add_argument("--list", action="store_true", help="say which templates there are")


def run(args: argparse.Namespace) -> int:
    """Copy the template and its data; when one of the files exists, nothing is written."""
    templates = {path.stem: path for path in sorted(resource("recipes").glob("*.rlhf"))}
    if args.list:
        width = max(map(len, templates), default=0)
        for name, path in templates.items():
            print(f"{name:<{width}}  {_about(path)}")
        return OK
    template = templates.get(args.template)
    if template is None:
        near = nearest(args.template, templates)
        fail(
            f"there is no template `{args.template}`; "
            + (f"did you mean {listed(near)}?" if near else "see --list")
        )
    compilation = load(template)
    if compilation.recipe is None:
        show(compilation.diagnostics, compilation.sources)
        fail(f"the template `{args.template}` of this installation is broken")
    folder = Path(args.folder)
    files = {Path(template.name): template} | {
        path: template.parent / path
        for named in data_files(compilation.recipe)
        for path in _files(template.parent, named)
    }
    taken = [str(folder / path) for path in files if (folder / path).exists()]
    if taken:
        fail(f"nothing was written, because there is {listed(taken)} already")
    for path, origin in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / path, origin.read_bytes())
        print(f"wrote {folder / path}")
    recipe = folder / template.name
    print(f"\nnext:  rlhf check {recipe}\n       rlhf plan {recipe}\n       rlhf run {recipe}")
    return OK


def data_files(recipe: Recipe) -> list[Path]:
    """The relative paths below the recipe's folder that its data, models and tokenizers are read from."""
    sources = [block["from"] for kind in ("data", "model") for block in recipe.of_kind(kind)]
    sources += [block["tokenizer"] for block in recipe.of_kind("model")]
    paths = [
        Path(source.path) for source in sources if isinstance(source, Source) and source.path is not None
    ]
    return list(dict.fromkeys(path for path in paths if not path.is_absolute() and ".." not in path.parts))


def _files(folder: Path, path: Path) -> list[Path]:
    """The files at a path of a template's folder: itself, or all below it."""
    if (folder / path).is_dir():
        return [file.relative_to(folder) for file in sorted((folder / path).rglob("*")) if file.is_file()]
    return [path] if (folder / path).is_file() else []


def _about(path: Path) -> str:
    """The first sentence of the comment at a recipe's head."""
    lines = path.read_text(encoding="utf-8").split("\n")
    comment = " ".join(
        line[1:].strip() for line in itertools.takewhile(lambda line: line.startswith("#"), lines)
    )
    return re.split(r"(?<=\.)\s|:\s", comment, maxsplit=1)[0].rstrip(".")
