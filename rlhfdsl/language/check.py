"""Syntax and table to typed blocks: every block, name and value against grammar/recipe.schema.json."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from rlhfdsl.language import presence, schema, unknown
from rlhfdsl.language.diagnostics import Diagnostic, Label, Span
from rlhfdsl.language.evaluate import Evaluator
from rlhfdsl.language.recipe import Block, Layer, Origin, Setting
from rlhfdsl.language.schema import Attr, Definition
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.suggest import a
from rlhfdsl.language.syntax import Attribute, BlockSyntax, Document, Expression, Text, Word, key_of
from rlhfdsl.language.values import INVALID, convert

_RECIPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ONCE = ("recipe", "cluster")


@dataclass(frozen=True, slots=True)
class Checked:
    """The typed blocks, by address.

    `complete` is False when a mistake may hide a setting or a block, `named` is when it may hide a name.
    """

    blocks: Mapping[str, Block]
    complete: bool
    named: bool


def check(
    document: Document,
    evaluator: Evaluator,
    sources: Mapping[str, SourceFile],
    problems: list[Diagnostic],
    idle: Iterable[tuple[Attr, Attribute]] = (),
) -> Checked:
    """Type every block; what is wrong goes to `problems`. Nothing is missed in a broken document.

    `idle` are settings of profiles that are not chosen: their values are checked, and have no effect.
    """
    checker = _Checker(evaluator, sources, problems, not document.broken)
    for block in document.blocks:
        checker.top(block)
    for attr, attribute in idle:
        checker.value(attr, attribute.value)
    return Checked(checker.blocks, checker.complete, checker.named)


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
        self.named = True
        self.blocks: dict[str, Block] = {}

    def report(self, code: str, message: str, span: Span | None, label: str = "", **more: Any) -> None:
        self.problems.append(Diagnostic(code, "error", message, span, label, **more))

    # ---- blocks

    def top(self, node: BlockSyntax) -> None:
        """One top-level block."""
        kind = node.kind.text
        if kind not in schema.kinds():
            self.complete = self.named = False  # its name may be what a reference means
            self.problems.append(unknown.kind(node))
            return
        named = self.stage_name(node) if kind == "stage" else self.block_name(node, schema.definition(kind))
        if named is None:
            self.complete = self.named = False
            return
        type_, name = named
        address = "recipe" if kind == "recipe" else f"{kind}.{name}"
        twin = self.blocks.get(address) if kind != "recipe" else None
        if kind in _ONCE:
            twin = next((block for block in self.blocks.values() if block.kind == kind), None)
        # A second one may be meant to change the first: what it lacks is not told.
        block = self.block(node if twin is None else replace(node, broken=True), type_, kind, address, name)
        if twin is None:
            self.blocks[address] = block
            return
        once = kind in _ONCE
        message = f"a recipe has one `{kind}` block" if once else f"there are two blocks `{address}`"
        help = "delete one of them" if once else "give one of them a name of its own"
        if twin.span is not None and twin.span.file != node.header.file:
            help = f"to change what an included file says, write `override {twin.address} {{ … }}`"
        elif kind == "stage":
            help = f"a second one has a name: `stage {type_.removeprefix('stage.')} NAME {{ … }}`"
        first = (Label(twin.span, "the first one"),) if twin.span is not None else ()
        code = "E0402" if once else "E0401"
        self.report(code, message, node.header, "the second one", secondary=first, help=help)

    def stage_name(self, node: BlockSyntax) -> tuple[str, str] | None:
        text = next((label for label in node.labels if isinstance(label, Text)), None)
        if text is not None or not node.labels:
            kinds = ", ".join(schema.stage_kinds())
            help = f"write `stage KIND {{ … }}` or `stage KIND NAME {{ … }}`; kinds: {kinds}"
            self.report("E0205", "a stage has a kind, which is a bare word", node.header, help=help)
            return None
        kind, name = node.labels[0], node.labels[-1]
        assert isinstance(kind, Word) and isinstance(name, Word)
        if kind.text not in schema.stage_kinds():
            self.problems.append(unknown.stage_kind(kind))
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
            key = key_of(member) if isinstance(member, Attribute) else self.inner_key(member, definition)
            if key is None:
                excused.add(member.kind.text if isinstance(member, BlockSyntax) else "")
                continue
            if key in places and not (isinstance(member, Attribute) and key in definition.blocks):
                first = (Label(places[key], "the first one"),)
                message = f"`{key}` is written twice in `{address}`"
                help = "keep one of them"
                self.report("E0403", message, key_span, "the second one", secondary=first, help=help)
                continue
            places[key] = key_span
            if isinstance(member, Attribute):
                # What a copied block or a base says can be said again here.
                own = [name for name, span in places.items() if _within(span, node.span)]
                attr = self.attribute(member, definition, address, own, excused)
                if attr is not None:
                    settings[key] = self.setting(attr, member)
            else:
                block_type = definition.blocks[member.kind.text][0]
                part = member.labels[0].text if member.labels and isinstance(member.labels[0], Word) else None
                inner[key] = self.block(member, block_type, member.kind.text, f"{address}.{key}", part)
        for block, (block_type, present) in definition.blocks.items():
            if present and block not in inner:
                where = f"{address}.{block}"
                broken = node.broken or block in places
                empty = BlockSyntax(node.kind, (), (), node.header, node.header, broken)
                inner[block] = self.block(empty, block_type, block, where, None, inside=block)
        if self.complete and not node.broken:
            there = places.keys() | excused
            self.problems += presence.missing(definition, address, node.header, there, inside)
        self.problems += presence.together(definition, address, settings, places, self.complete)
        ordered = presence.with_defaults(definition, settings, name)
        return Block(address, kind, type_, name, node.header, ordered, inner)

    def inner_key(self, node: BlockSyntax, definition: Definition) -> str | None:
        """`kl`, or `mix.PART` for an inner block with a name; None when it cannot be here."""
        kind = node.kind.text
        if node.copied is not None:
            message = "only a top-level block is made `from` another"
            self.report("E0214", message, node.copied.span, help="write its settings out")
        if kind not in definition.blocks:
            refused = unknown.refused(kind, node.kind.span, definition)
            self.problems.append(refused or unknown.inner_block(node, definition))
            return None
        allowed = schema.definition(definition.blocks[kind][0]).label == "name?"
        if not node.labels:
            return kind
        label = node.labels[0]
        if not allowed or len(node.labels) > 1 or isinstance(label, Text):
            message = f"`{kind}` has no name here"
            if allowed:
                message = f"a `{kind}` block has one name at most, a bare word"
            self.report("E0205", message, node.header, help=f"write `{kind} {{ … }}`")
            return None
        return f"{kind}.{label.text}"

    # ---- attributes and values

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
            help = f"write `{block} {{ {last} = … }}`; a dotted name is for a profile and --set"
            self.report("E0312", f"a block sets its own attributes only, not `{name}`", span, help=help)
            excused.add(block)
            return None
        if name in definition.blocks:
            message = f"`{name}` is a block, not an attribute"
            self.report("E0303", message, span, help=f"write `{name} {{ … }}`")
            return None
        refused = unknown.refused(name, span, definition)
        if refused is not None:
            self.problems.append(refused)
            return None
        guess = unknown.attribute(name, span, definition, set(taken) - {name})
        excused.add(guess.stands_for)
        message = f"unknown attribute `{name}` in {a(definition.name)} block"
        label = f"not an attribute of `{address}`"
        self.report("E0301", message, span, label, help=guess.help, fixes=guess.fixes)
        return None

    def value(self, attr: Attr, expression: Expression) -> Any:
        """The converted value of an expression; INVALID after its mistake was reported."""
        value = self.evaluator.value(expression)
        if value is None:
            return INVALID
        folder = self.sources[self.evaluator.literal(expression).span.file].folder
        plain = convert(attr, expression, value, self.blocks, folder)
        if isinstance(plain, Diagnostic):
            self.problems.append(plain)
            return INVALID
        return plain

    def setting(self, attr: Attr, node: Attribute) -> Setting:
        """The converted value with its origin, and those of the weaker settings that it took the place of."""
        plain = self.value(attr, node.value)
        earlier: list[Origin] = []
        weaker = node.earlier
        while weaker is not None:
            earlier.append(self.origin(weaker))
            weaker = weaker.earlier
        return Setting(
            plain, node.value.span, self.origin(node), node.path.span, tuple(earlier), node.value
        )

    def origin(self, node: Attribute) -> Origin:
        source = self.sources[node.value.span.file]
        given = self.evaluator.given_by(node.value) if node.layer in ("base", "file") else None
        layer: Layer = "param" if given else node.layer
        where = f"-p {given}" if given else "--set" if layer == "set" else place(source, node.value.span)
        return Origin(layer, where, source.slice(node.value.span))


def _within(span: Span, outer: Span) -> bool:
    return span.file == outer.file and outer.start <= span.start and span.end <= outer.end


def place(source: SourceFile, span: Span) -> str:
    """A place as `quickstart.rlhf:12:3`, seen from the recipe's folder."""
    line, column = source.position(span.start)
    return f"{posixpath.join(source.folder, PurePosixPath(source.name).name)}:{line}:{column}"
