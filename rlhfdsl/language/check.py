"""Syntax and table to typed blocks: every block, name and value against grammar/recipe.schema.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rlhfdsl.language import schema
from rlhfdsl.language.diagnostics import Diagnostic, Fix, Label, Span
from rlhfdsl.language.evaluate import Evaluator
from rlhfdsl.language.recipe import Block, Layer, Origin, Setting
from rlhfdsl.language.schema import Attr, Definition
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.language.syntax import Attribute, BlockSyntax, Document, Text, Word
from rlhfdsl.language.values import INVALID, convert, rename

_RECIPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ONCE = ("recipe", "cluster")


@dataclass(frozen=True, slots=True)
class Checked:
    """The typed blocks, by address; `complete` is False when a mistake may hide some."""

    blocks: Mapping[str, Block]
    complete: bool


def address_of(block: BlockSyntax) -> str:
    """The address of a top-level block, as far as its header tells it."""
    words = [label.text for label in block.labels if isinstance(label, Word)]
    if block.kind.text == "stage":
        return f"stage.{words[-1] if words else ''}"
    return f"{block.kind.text}.{words[0]}" if words else block.kind.text


def check(
    document: Document,
    evaluator: Evaluator,
    sources: Mapping[str, SourceFile],
    problems: list[Diagnostic],
) -> Checked:
    """Type every block; what is wrong goes to `problems`. Nothing is missed in a broken document."""
    checker = _Checker(evaluator, sources, problems, not document.broken)
    for block in document.blocks:
        checker.top(block)
    return Checked(checker.blocks, checker.complete)


class _Checker:
    def __init__(
        self,
        evaluator: Evaluator,
        sources: Mapping[str, SourceFile],
        problems: list[Diagnostic],
        complete: bool,
    ) -> None:
        self.evaluator = evaluator
        self.sources = sources
        self.problems = problems
        self.complete = complete
        self.blocks: dict[str, Block] = {}

    def report(self, code: str, message: str, span: Span | None, label: str = "", **more: Any) -> None:
        self.problems.append(Diagnostic(code, "error", message, span, label, **more))

    # ---- blocks

    def top(self, node: BlockSyntax) -> None:
        """One top-level block."""
        kind = node.kind.text
        if kind not in schema.kinds():
            self.complete = False  # its name may be what a reference means
            near = nearest(kind, schema.kinds())
            inner = [t.rpartition(".")[0] for t in schema.types() if t.count(".") and t.endswith("." + kind)]
            fixes: tuple[Fix, ...] = ()
            if near:
                help, fixes = f"did you mean {listed(near)}?", (rename(near[0], node.kind.span),)
            elif kind in schema.stage_kinds():
                help = f"a stage is written `stage {kind} {{ … }}`"
            elif inner:
                help = f"`{kind}` is a block inside `{inner[0].replace('.', ' ')}`"
            else:
                help = f"kinds: {', '.join(schema.kinds())}"
            self.report(
                "E0206", f"there is no kind of block `{kind}`", node.kind.span, help=help, fixes=fixes
            )
            return
        named = self.stage_name(node) if kind == "stage" else self.block_name(node, schema.definition(kind))
        if named is None:
            self.complete = False
            return
        type_, name = named
        address = "recipe" if kind == "recipe" else f"{kind}.{name}"
        twin = self.blocks.get(address) if kind != "recipe" else None
        if kind in _ONCE:
            twin = next((block for block in self.blocks.values() if block.kind == kind), None)
        block = self.block(node, type_, kind, address, name)
        if twin is not None:
            code = "E0402" if kind in _ONCE else "E0401"
            what = (
                f"a recipe has one `{kind}` block" if kind in _ONCE else f"there are two blocks `{address}`"
            )
            first = (Label(twin.span, "the first one"),) if twin.span is not None else ()
            help = "give one of them a name of its own" if code == "E0401" else "delete one of them"
            if kind == "stage":
                help = f"a second one has a name: `stage {type_.removeprefix('stage.')} NAME {{ … }}`"
            self.report(code, what, node.header, "the second one", secondary=first, help=help)
            return
        self.blocks[address] = block

    def stage_name(self, node: BlockSyntax) -> tuple[str, str] | None:
        kinds = schema.stage_kinds()
        text = next((label for label in node.labels if isinstance(label, Text)), None)
        if text is not None or not node.labels:
            help = f"write `stage KIND {{ … }}` or `stage KIND NAME {{ … }}`; kinds: {', '.join(kinds)}"
            self.report("E0205", "a stage has a kind, which is a bare word", node.header, help=help)
            return None
        kind, name = node.labels[0], node.labels[-1]
        assert isinstance(kind, Word) and isinstance(name, Word)
        if kind.text not in kinds:
            near = nearest(kind.text, kinds)
            help = f"did you mean {listed(near)}?" if near else f"kinds: {', '.join(kinds)}"
            fixes = (rename(near[0], kind.span),) if near else ()
            self.report(
                "E0207", f"there is no kind of stage `{kind.text}`", kind.span, help=help, fixes=fixes
            )
            return None
        return f"stage.{kind.text}", name.text

    def block_name(self, node: BlockSyntax, definition: Definition) -> tuple[str, str] | None:
        kind = node.kind.text
        label = node.labels[0] if len(node.labels) == 1 else None
        if definition.label == "text":
            if isinstance(label, Text) and _RECIPE_NAME.fullmatch(label.value):
                return kind, label.value
            message = f"a `{kind}` block has a quoted name of letters, digits, `.`, `_` and `-`"
            help = f'write `{kind} "my-run" {{ … }}`'
        else:
            if isinstance(label, Word):
                return kind, label.text
            message = f"a `{kind}` block has one name, a bare word"
            word = re.sub(r"\W+", "_", label.value) if isinstance(label, Text) else "NAME"
            help = f"write `{kind} {word} {{ … }}`"
        self.report("E0205", message, node.header, help=help)
        return None

    def block(
        self, node: BlockSyntax, type_: str, kind: str, address: str, name: str | None, inside: str = ""
    ) -> Block:
        """A block with its settings, defaults and inner blocks; `inside` names one that is not written."""
        definition = schema.definition(type_)
        settings: dict[str, Setting] = {}
        inner: dict[str, Block] = {}
        places: dict[str, Span] = {}
        excused: set[str] = set()
        for member in node.members:
            key_span = member.path.span if isinstance(member, Attribute) else member.kind.span
            key = member.path.text if isinstance(member, Attribute) else self.inner_key(member, definition)
            if key is None:
                excused.add(member.kind.text if isinstance(member, BlockSyntax) else "")
                continue
            if key in places and not (isinstance(member, Attribute) and key in definition.blocks):
                first = (Label(places[key], "the first one"),)
                message = f"`{key}` is written twice in `{address}`"
                self.report(
                    "E0403", message, key_span, "the second one", secondary=first, help="keep one of them"
                )
                continue
            places[key] = key_span
            if isinstance(member, Attribute):
                attr = self.attribute(member, definition, address, places, excused)
                if attr is not None:
                    settings[key] = self.setting(attr, member, address)
            else:
                block_type = definition.blocks[member.kind.text][0]
                part = member.labels[0].text if member.labels and isinstance(member.labels[0], Word) else None
                inner[key] = self.block(member, block_type, member.kind.text, f"{address}.{key}", part)
        for block, (block_type, present) in definition.blocks.items():
            if present and block not in inner:
                where = f"{address}.{block}"
                empty = BlockSyntax(
                    node.kind, (), (), node.header, node.header, node.broken or block in places
                )
                inner[block] = self.block(empty, block_type, block, where, None, inside=block)
        if self.complete and not node.broken:
            self.missing(definition, address, node.header, places.keys() | excused, inside)
        self.together(definition, address, settings, places)
        ordered = self.with_defaults(definition, settings, name)
        return Block(address, kind, type_, name, node.header, ordered, inner)

    def inner_key(self, node: BlockSyntax, definition: Definition) -> str | None:
        """`kl`, or `mix.PART` for an inner block with a name; None when it cannot be here."""
        kind = node.kind.text
        if kind not in definition.blocks:
            if kind in definition.attributes:
                message = f"`{kind}` is an attribute, not a block"
                help = f"write `{definition.attributes[kind].example}`"
                self.report("E0302", message, node.header, help=help)
            else:
                near = nearest(kind, [*definition.blocks, *definition.attributes])
                known = (
                    f"its blocks: {', '.join(definition.blocks)}"
                    if definition.blocks
                    else "it has no inner blocks"
                )
                help = f"did you mean {listed(near)}?" if near else known
                fixes = (rename(near[0], node.kind.span),) if near else ()
                message = f"unknown block `{kind}` in a `{definition.name}` block"
                self.report("E0301", message, node.kind.span, help=help, fixes=fixes)
            return None
        allowed = schema.definition(definition.blocks[kind][0]).label == "name?"
        if not node.labels:
            return kind
        label = node.labels[0]
        if not allowed or len(node.labels) > 1 or isinstance(label, Text):
            message = (
                f"a `{kind}` block has one name at most, a bare word"
                if allowed
                else f"`{kind}` has no name here"
            )
            self.report("E0205", message, node.header, help=f"write `{kind} {{ … }}`")
            return None
        return f"{kind}.{label.text}"

    # ---- what is written, and what is not

    def attribute(
        self,
        node: Attribute,
        definition: Definition,
        address: str,
        taken: Iterable[str],
        excused: set[str],
    ) -> Attr | None:
        name, span = node.path.text, node.path.span
        if definition.free is not None and len(node.path.words) == 1:
            return Attr(name, definition.free.alternatives, definition.free.table)
        if name in definition.attributes:
            return definition.attributes[name]
        if len(node.path.words) > 1:
            block, last = node.path.words[0].text, node.path.words[-1].text
            help = f"write `{block} {{ {last} = … }}`; a dotted name is for --set"
            self.report("E0312", f"a block sets its own attributes only, not `{name}`", span, help=help)
            excused.add(block)
            return None
        if name in definition.blocks:
            message = f"`{name}` is a block, not an attribute"
            self.report("E0303", message, span, help=f"write `{name} {{ … }}`")
            return None
        help, fixes = self.unknown(node, definition, set(taken) - {name}, excused)
        message = f"unknown attribute `{name}` in a `{definition.name}` block"
        self.report("E0301", message, span, f"not an attribute of `{address}`", help=help, fixes=fixes)
        return None

    def unknown(
        self, node: Attribute, definition: Definition, taken: set[str], excused: set[str]
    ) -> tuple[str, tuple[Fix, ...]]:
        """The help for an unknown attribute, and a fix: its name here or elsewhere, the nearest, or all.

        What it most likely stands for goes to `excused`, so that it is not missed as well.
        """
        name, span = node.path.text, node.path.span
        for block, (inner, _) in definition.blocks.items():
            if name in schema.definition(inner).attributes:
                excused.add(block)
                return f"`{name}` stands in the block `{block}`: `{block} {{ {name} = … }}`", ()
        aliases = schema.from_alias(definition.type, name)
        for type_, right, tools in aliases[:1]:
            whose = f"`{name}` ({', '.join(tools)}) is `{right}`"
            if type_ == definition.type:
                excused.add(right)
                return f"{whose} here", () if right in taken else (rename(right, span),)
            if type_.startswith(definition.type + "."):
                block = type_.removeprefix(definition.type + ".")
                excused.add(block)
                return f"{whose} in the block `{block}` here", ()
        absent = schema.table()["x-absent"].get(name)
        if absent:
            return str(absent), ()
        if aliases:
            return f"{whose} in {_home(type_)}", ()
        names = [n for n in (*definition.attributes, *definition.blocks) if n not in taken]
        near = nearest(name, names)
        if near:
            excused.add(near[0])
            fixes = (rename(near[0], span),) if near[0] in definition.attributes else ()
            return f"did you mean {listed(near)}?", fixes
        homes = [type_ for type_ in schema.types() if name in schema.definition(type_).attributes]
        if homes:
            return f"`{name}` stands in {_home(homes[0])}", ()
        return f"attributes: {', '.join([*definition.attributes, *definition.blocks])}", ()

    def missing(
        self, definition: Definition, address: str, header: Span, present: Iterable[str], inside: str
    ) -> None:
        """Required attributes and blocks that are not there; `inside` names a block that is not written."""
        there = set(present)
        lacks = [name for name in definition.required if name not in there]
        wanted = [
            definition.attributes[name].example if name in definition.attributes else f"{name} {{ … }}"
            for name in lacks
        ]
        if definition.one_of and not there & set(definition.one_of):
            lacks.append("` or `".join(definition.one_of))
            wanted.append("` or `".join(definition.attributes[name].example for name in definition.one_of))
        for name, needs in definition.needs.items():
            if name in there and len(there & set(definition.one_of)) == 1 and name in definition.one_of:
                absent = [need for need in needs if need not in there]
                lacks += absent
                wanted += [definition.attributes[need].example for need in absent]
        if definition.free is not None and definition.table.get("minProperties") and not there:
            self.report("E0305", f"`{address}` is empty", header, help="write for example `NAME = 50%`")
        if lacks:
            help = "write " + ", ".join(f"`{line}`" for line in wanted)
            if inside:
                help = f"write `{inside} {{ {', '.join(wanted)} }}`"
            self.report("E0305", f"`{address}` lacks {listed(lacks)}", header, help=help)

    def together(
        self,
        definition: Definition,
        address: str,
        settings: Mapping[str, Setting],
        places: Mapping[str, Span],
    ) -> None:
        """Attributes that exclude each other, and those that do nothing without another one."""
        clash: set[str] = set()
        for group in definition.exclusive:
            both = [name for name in group if name in places]
            if len(both) > 1:
                clash |= set(both)
                first, second = sorted(both, key=lambda name: places[name])[:2]
                message = f"`{first}` and `{second}` exclude each other in `{address}`"
                label = (Label(places[first], "one of them"),)
                self.report(
                    "E0310",
                    message,
                    places[second],
                    "and the other",
                    secondary=label,
                    help="keep one of them",
                )
        if clash:
            return
        for name, needs in definition.needs.items():
            if name not in settings or name in definition.one_of:
                continue
            for need in needs:
                absent = need not in places and self.complete
                if absent or (need in settings and settings[need].value is None):
                    message = f"`{name}` has no effect without `{need}`"
                    help = f"delete it, or write `{definition.attributes[need].example}`"
                    self.report("E0311", message, places[name], help=help)

    def with_defaults(
        self, definition: Definition, written: Mapping[str, Setting], name: str | None
    ) -> dict[str, Setting]:
        """Every attribute of the type in the table's order, with the default of what is not written."""
        if definition.free is not None:
            return dict(written)
        beside = definition.table.get("x-defaults-with", {})
        replaced = {
            key: value
            for other, values in beside.items()
            if other in written
            for key, value in values.items()
        }
        out_of_play = {n for group in definition.exclusive for n in group if any(m in written for m in group)}
        settings: dict[str, Setting] = {}
        for key, attr in definition.attributes.items():
            if key in written:
                settings[key] = written[key]
                continue
            value = replaced.get(key, attr.table.get("default"))
            if key in out_of_play:
                value = None
            if "x-default" in attr.table:
                value = attr.table["x-default"].format(name=name)
            if "x-default-from" in attr.table and attr.table["x-default-from"] in written:
                value = written[attr.table["x-default-from"]].value
            value = tuple(value) if isinstance(value, list) else value
            settings[key] = Setting(value, None, Origin("default", "", _shown(value, attr)))
        return settings

    def setting(self, attr: Attr, node: Attribute, address: str) -> Setting:
        """The converted value with its origin."""
        expression = node.value
        value = self.evaluator.value(expression)
        plain: Any = INVALID if value is None else convert(attr, expression, value, self.blocks)
        if isinstance(plain, Diagnostic):
            self.problems.append(plain)
            plain = INVALID
        given = self.evaluator.given_by(expression)
        source = self.sources[expression.span.file]
        layer: Layer = "param" if given and node.layer == "file" else node.layer
        where = (
            f"-p {given}"
            if layer == "param"
            else "--set"
            if layer == "set"
            else _place(source, expression.span)
        )
        origin = Origin(layer, where, source.slice(expression.span))
        return Setting(plain, expression.span, origin, node.path.span)


def _home(type_: str) -> str:
    """A type of block, for a message: `a parallel block`, `the block kl of a stage ppo`."""
    outer, _, block = type_.rpartition(".")
    if outer in ("", "stage"):
        return f"a `{schema.definition(type_).name}` block"
    return f"the block `{block}` of a `{schema.definition(outer).name}`"


def _place(source: SourceFile, span: Span) -> str:
    line, column = source.position(span.start)
    return f"{PurePosixPath(source.name).name}:{line}:{column}"


def _shown(value: Any, attr: Attr) -> str:
    """A default as a recipe would write it; empty for none."""
    if value is None:
        words = [schema.none_word(a) for a in attr.alternatives if schema.shape(a) == "none"]
        return words[0] if words else ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "[" + ", ".join(_shown(item, attr) for item in value) + "]"
    return str(value)
