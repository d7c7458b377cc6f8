"""`rlhf explain`: one value of a recipe with the chain of its origins, a code, or an entry of the table."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from rlhfdsl.cli.common import ERROR, OK, add_recipe_options, compile_recipe, fail, show, use_colour
from rlhfdsl.language import schema
from rlhfdsl.language.diagnostics.pages import codes, page
from rlhfdsl.language.explain import describe_type, explain
from rlhfdsl.language.settings import attributes_of
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.language.terminal import visible

HELP = "show where a value comes from, or what an error code means"
_NEAR = 3  # names told for one that is not there
_CODE = re.compile(r"[EW]\d{4}", re.IGNORECASE)
_LAYERS = {"base": "the base, ", "profile": "the profile, ", "default": "the default"}


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf explain`."""
    parser.add_argument("subject", metavar="FILE|CODE|TYPE", help="a recipe, E0301, or stage.ppo.kl")
    parser.add_argument(
        "path", nargs="?", metavar="PATH", help="of the recipe: stage.ppo.kl.coef, model.base, param.seed"
    )
    add_recipe_options(parser)
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="how to print (default: text)"
    )


def run(args: argparse.Namespace) -> int:
    """Print what is known about it; 1 when the recipe has no such address."""
    if args.path is None and _CODE.fullmatch(args.subject):
        return _code(args)
    if args.path is None and not args.subject.endswith(".rlhf") and args.subject != "-":
        facts = describe_type(args.subject)
        if facts is None:
            known = [name for t in schema.types() for name in (t, *(f"{t}.{a}" for a in attributes_of(t)))]
            near = [name for name in known if name.endswith(f".{args.subject}")][:_NEAR]
            near = near or nearest(args.subject, dict.fromkeys(known))
            help = f"; did you mean {listed(near)}?" if near else ""
            fail(f"`{args.subject}` is not a code, a block or an attribute{help}")
        return _print(facts, args)
    if args.path is None:
        fail("say what of the recipe: rlhf explain FILE stage.ppo.kl.coef")
    compilation = compile_recipe(args.subject, args)
    facts = explain(compilation, args.path)
    if facts is not None:
        return _print(facts, args)
    show(compilation.diagnostics, compilation.sources)
    if compilation.recipe is not None:
        known = [f"{a}.{n}" for a, b in compilation.recipe.blocks.items() for n in (*b.settings, *b.blocks)]
        near = nearest(args.path, [*compilation.recipe.blocks, *known])
        help = f"; did you mean {listed(near)}?" if near else f"; blocks: {', '.join(compilation.recipe.blocks)}"
        print(f"rlhf: `{args.path}` is nothing of this recipe{help}", file=sys.stderr)
    return ERROR


def _code(args: argparse.Namespace) -> int:
    code = args.subject.upper()
    text = page(code)
    if text is None:
        near = nearest(code, codes())
        fail(f"there is no code {code}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    if args.format == "json":
        print(json.dumps({"format_version": "1.0", "code": code, "page": text}, indent=2, ensure_ascii=False))
    elif use_colour(sys.stdout):
        from rich.console import Console
        from rich.markdown import Markdown

        Console(width=100).print(Markdown(text))
    else:
        print(text, end="")
    return OK


def _print(facts: dict[str, Any], args: argparse.Namespace) -> int:
    if args.format == "json":
        print(json.dumps({"format_version": "1.0"} | facts, indent=2, ensure_ascii=False))
        return OK
    lines = {
        "setting": _setting, "param": _setting, "let": _setting, "block": _block, "type": _type,
        "attribute": _attribute,
    }[facts["what"]](facts)  # fmt: skip
    print(visible("\n".join(lines)))
    return OK


def _setting(facts: dict[str, Any]) -> list[str]:
    value = facts["value"]
    lines = [f"{facts['address']} = {value}" if value else f"{facts['address']} has no value", ""]
    rows = []
    for index, link in enumerate(facts["chain"]):
        who = _LAYERS.get(link["layer"], "") + link["where"]
        rows.append(("set by" if index == 0 else "over", who, link["text"]))
    for index, read in enumerate(facts["reads"]):
        name = f"{read['name']} = {read['value']}"
        rows.append(("reads" if index == 0 else "", f"{name}, {read['where']}", read["text"]))
    return [*lines, *_table(rows), *_about(facts)]


def _attribute(facts: dict[str, Any]) -> list[str]:
    return [facts["address"], *_about(facts)]


def _about(facts: dict[str, Any]) -> list[str]:
    """What the table says: doc, type, default, what it affects and becomes, its names elsewhere."""
    if "type" not in facts:
        return []
    rows = [("type", facts["type"], "")]
    if "affects" in facts:
        rows.append(("default", facts["default"] or "none", ""))
        rows.append(("affects", facts["affects"], ""))
        rows.append(("example", facts["example"], ""))
    for key in facts.get("deepspeed", ()):
        rows.append(("becomes", f"{key} of DeepSpeed's configuration", ""))
    tools: dict[str, list[str]] = {}
    for tool, names in facts.get("elsewhere", {}).items():
        for name in names:
            tools.setdefault(name, []).append(tool)
    for index, (name, whose) in enumerate(tools.items()):
        rows.append(("elsewhere" if index == 0 else "", f"{name} ({', '.join(whose)})", ""))
    doc = ["", f"  {facts['doc']}"] if "doc" in facts else []
    return [*doc, "", *_table(rows)]


def _block(facts: dict[str, Any]) -> list[str]:
    rows = []
    for setting in facts["settings"]:
        if setting["layer"] != "default" or setting["value"]:
            who = _LAYERS.get(setting["layer"], "") + setting["where"]
            rows.append((setting["name"], setting["value"], who))
    inner = [("", f"block {address}", "") for address in facts["blocks"]]
    return [facts["address"], "", f"  {facts['doc']}", "", *_table(rows), *_table(inner)]


def _type(facts: dict[str, Any]) -> list[str]:
    rows = [(name, one["type"], one["default"] or "") for name, one in facts["attributes"].items()]
    blocks = [(name, "block", doc) for name, doc in facts["blocks"].items()]
    return [facts["address"], "", f"  {facts['doc']}", "", *_table([*rows, *blocks])]


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max((len(row[i]) for row in rows if row[2] or i == 0), default=0) for i in (0, 1)]
    return [f"  {a:<{widths[0]}}  {b:<{widths[1] if c else 0}}  {c}".rstrip() for a, b, c in rows]
