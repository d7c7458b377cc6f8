"""Names that a block does not have: what was most likely meant, and what to write in its place."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rlhfdsl.language import schema
from rlhfdsl.language.diagnostics import Diagnostic, Fix, Span
from rlhfdsl.language.schema import Definition
from rlhfdsl.language.suggest import a, listed, nearest
from rlhfdsl.language.syntax import BlockSyntax, Word
from rlhfdsl.language.values import rename

_NAMES = 24  # told in one message


_STATEMENTS = {  # what stands beside the blocks, each as it is written
    "param": "param size: int = 4",
    "let": "let batch = 4 * param.size",
    "profile": "profile quick { stage.sft.steps = 10 }",
    "override": "override stage.sft { steps = 100 }",
    "extends": 'extends "base.rlhf"',
    "import": 'import "models.rlhf" as m',
}


@dataclass(frozen=True, slots=True)
class Guess:
    """A help, fixes, and what the wrong name stands for, so that this is not missed as well."""

    help: str
    fixes: tuple[Fix, ...] = ()
    stands_for: str = ""


def kind(node: BlockSyntax) -> Diagnostic:
    """A kind of block that does not exist."""
    word = node.kind
    near = nearest(word.text, schema.kinds())
    inner = [type_.rpartition(".")[0] for type_ in schema.types() if type_.endswith("." + word.text)]
    fixes: tuple[Fix, ...] = ()
    if near:
        help, fixes = f"did you mean {listed(near)}?", tuple(rename(name, word.span) for name in near)
    elif statement := nearest(word.text, _STATEMENTS, limit=1):
        help = f"did you mean `{statement[0]}`? It is written `{_STATEMENTS[statement[0]]}`"
    elif word.text in schema.stage_kinds():
        help = f"a stage is written `stage {word.text} {{ … }}`"
    elif inner:
        help = f"`{word.text}` is a block inside `{inner[0].replace('.', ' ')}`"
    else:
        help = f"kinds: {', '.join(schema.kinds())}"
    message = f"there is no kind of block `{word.text}`"
    return Diagnostic("E0206", "error", message, word.span, help=help, fixes=fixes)


def stage_kind(word: Word) -> Diagnostic:
    """A kind of stage that does not exist."""
    kinds = schema.stage_kinds()
    near = nearest(word.text, kinds)
    help = f"did you mean {listed(near)}?" if near else f"kinds: {', '.join(kinds)}"
    fixes = tuple(rename(name, word.span) for name in near)
    message = f"there is no kind of stage `{word.text}`"
    return Diagnostic("E0207", "error", message, word.span, help=help, fixes=fixes)


def refused(name: str, span: Span, definition: Definition) -> Diagnostic | None:
    """A key of DeepSpeed that a recipe does not pass on: the plan derives it, or it has no part in a run."""
    derived, unused = (definition.table.get(key, {}) for key in ("x-derived", "x-unused"))
    if name in derived:
        message = f"the plan sets `{name}` of DeepSpeed's configuration"
        return Diagnostic("E0320", "error", message, span, "not passed on", help=derived[name])
    if name in unused:
        message = f"`{name}` of DeepSpeed's configuration has no part in a run"
        return Diagnostic("E0321", "error", message, span, "not passed on", help=unused[name])
    return None


def inner_block(node: BlockSyntax, definition: Definition) -> Diagnostic:
    """An inner block that its block does not have."""
    name = node.kind.text
    if name in definition.attributes:
        message = f"`{name}` is an attribute, not a block"
        help = f"write `{definition.attributes[name].example}`"
        return Diagnostic("E0302", "error", message, node.header, help=help)
    near = nearest(name, [*definition.blocks, *definition.attributes])
    if not near and (told := _near_refused(name, definition)):
        message = f"unknown block `{name}` in {a(definition.name)} block"
        return Diagnostic("E0301", "error", message, node.kind.span, help=told)
    blocks = ", ".join(definition.blocks)
    known = f"its blocks: {blocks}" if blocks else "it has no inner blocks"
    homes = [type_ for type_ in schema.types() if name in schema.definition(type_).blocks]
    if homes:
        nearest_home = max(homes, key=lambda type_: len(os.path.commonprefix((type_, definition.type))))
        known = f"`{name}` stands in {home(nearest_home)}"
    help = f"did you mean {listed(near)}?" if near else known
    fixes = tuple(rename(name, node.kind.span) for name in near)
    message = f"unknown block `{name}` in {a(definition.name)} block"
    return Diagnostic("E0301", "error", message, node.kind.span, help=help, fixes=fixes)


def attribute(name: str, span: Span, definition: Definition, taken: set[str]) -> Guess:
    """An attribute that a block does not have: its name here or in a block near, the nearest, or all names."""
    for block, (inner, _) in definition.blocks.items():
        if name in schema.definition(inner).attributes:
            return Guess(f"`{name}` stands in the block `{block}`: `{block} {{ {name} = … }}`", (), block)
    aliases = schema.from_alias(definition.type, name)
    whose = ""
    for type_, right, tools in aliases[:1]:
        whose = f"`{name}` ({', '.join(tools)}) is `{right}`"
        if type_ == definition.type:
            return Guess(f"{whose} here", () if right in taken else (rename(right, span),), right)
        if type_.startswith(definition.type + "."):
            block = type_.removeprefix(definition.type + ".")
            return Guess(f"{whose} in the block `{block}` here", (), block)
    absent = schema.table()["x-absent"].get(name)
    if absent:
        return Guess(str(absent))
    if aliases:
        return Guess(f"{whose} in {home(aliases[0][0])}")
    near = nearest(name, [n for n in (*definition.attributes, *definition.blocks) if n not in taken])
    if near:
        fixes = tuple(rename(name, span) for name in near if name in definition.attributes)
        return Guess(f"did you mean {listed(near)}?", fixes, near[0])
    told = _near_refused(name, definition)
    if told:
        return Guess(told)
    homes = [type_ for type_ in schema.types() if name in schema.definition(type_).attributes]
    if homes:
        return Guess(f"`{name}` stands in {home(homes[0])}")
    names = [*definition.attributes, *definition.blocks]
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return Guess(f"attributes: {', '.join(names[:_NAMES])}{more}")


def _near_refused(name: str, definition: Definition) -> str:
    """The nearest key of DeepSpeed that a block or one inside it refuses, and why; empty when none is near."""
    for type_ in (definition.type, *(inner for inner, _ in definition.blocks.values())):
        table = schema.definition(type_).table
        keys = {**table.get("x-derived", {}), **table.get("x-unused", {})}
        near = nearest(name, keys, 1)
        if near:
            return f"did you mean `{near[0]}`? A recipe does not pass it on: {keys[near[0]]}"
    return ""


def home(type_: str) -> str:
    """A type of block, for a message: `a parallel block`, `the block kl of a stage ppo`."""
    outer, _, block = type_.rpartition(".")
    if outer in ("", "stage"):
        return f"{a(schema.definition(type_).name)} block"
    return f"the block `{block}` of a `{schema.definition(outer).name}`"
