"""References to blocks: that they exist, fit, and make no circle; the order of the stages."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from rlhfdsl.language import schema
from rlhfdsl.language.diagnostics import Diagnostic, Fix, Label, Span
from rlhfdsl.language.recipe import Block, Reference, Setting
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.language.syntax import BlockSyntax, Document, Member, paths_of
from rlhfdsl.language.values import rename, takes


def references(block: Block) -> Iterator[tuple[Block, str, Setting, Reference]]:
    """Every reference in a block and its inner blocks: (inner block, attribute, setting, reference)."""
    for name, setting in block.settings.items():
        if isinstance(setting.value, Reference):
            yield block, name, setting, setting.value
    for inner in block.blocks.values():
        yield from references(inner)


def named(block: Block) -> Iterator[str]:
    """The addresses of the blocks that the inner blocks of free names (`mix`, `add`) name."""
    for inner in block.blocks.values():
        if inner.kind in schema.naming():
            yield from (f"{schema.naming()[inner.kind]}.{name}" for name in inner.settings)
        yield from named(inner)


def link(
    blocks: Mapping[str, Block], named: bool, complete: bool, problems: list[Diagnostic]
) -> dict[str, Block]:
    """The blocks with every reference resolved: a blend without a part named gets the stage's own.

    Unknown blocks are reported when every block is `named`, unknown parts when all is `complete`.
    """
    linker = _Linker(blocks, named, complete, problems)
    return {address: linker.resolve(block, block) for address, block in blocks.items()}


def order(blocks: Mapping[str, Block], problems: list[Diagnostic]) -> tuple[Block, ...]:
    """The stages, each after those that it needs, otherwise in the file's order; a circle is reported."""
    stages = {address: block for address, block in blocks.items() if block.kind == "stage"}
    done: dict[str, Block] = {}
    open_: list[str] = []

    def visit(address: str) -> bool:
        if address in done:
            return True
        if address in open_:
            circle = [*open_[open_.index(address) :], address]
            closing = [s.span for _, _, s, ref in references(stages[circle[-2]]) if ref.address == address]
            span = closing[0] if closing else stages[circle[-2]].span  # it may lead through a scorer
            message = f"stages need each other: {' -> '.join(circle)}"
            help = "one of them has to start from a `model` block, or from a stage that needs none of these"
            problems.append(Diagnostic("E0203", "error", message, span, "this closes the circle", help=help))
            return False
        open_.append(address)
        scorers = {name: blocks[name] for name in named(stages[address]) if name in blocks}
        edges = [reference.address for _, _, _, reference in references(stages[address])]
        scorers |= {name: blocks[name] for name in edges if name in blocks and blocks[name].kind == "scorer"}
        edges += [reference.address for scorer in scorers.values() for _, _, _, reference in references(scorer)]
        for edge in edges:
            if edge in stages and not visit(edge):
                return False
        open_.pop()
        done[address] = stages[address]
        return True

    for address in stages:
        if not visit(address):
            break
    return tuple(done.values())


def unreached(blocks: Mapping[str, Block], root: str) -> list[Diagnostic]:
    """A warning for each block of the file `root` that no stage reaches."""
    reached: set[str] = set()
    todo = [block for block in blocks.values() if block.kind == "stage"]
    while todo:
        block = todo.pop()
        names = {reference.address for _, _, _, reference in references(block)} | set(named(block))
        for address in sorted(names - reached):
            reached.add(address)
            if address in blocks:
                todo.append(blocks[address])
    return [
        Diagnostic(
            "W0201", "warning", f"no stage reaches `{address}`", block.span, help="delete it, or use it"
        )
        for address, block in blocks.items()
        if block.kind not in ("recipe", "cluster", "stage") and address not in reached
        if block.span is None or block.span.file == root
    ]


def fitting(blocks: Mapping[str, Block], uses: Collection[str]) -> list[str]:
    """The addresses that an edge takes: `uses` are policy, reward, rows or parallel."""
    return [address for address, block in blocks.items() if _made(block, None) in uses]


def unread(document: Document, used: set[str], root: str) -> list[Diagnostic]:
    """A warning for each parameter and `let` of the file `root` that nothing reads.

    What the files say counts, also where a profile or --set stands over it; `used` were read beside.
    """
    values = {f"param.{param.name.text}": param.default for param in document.params}
    values |= {f"let.{let.name.text}": let.value for let in document.lets}
    todo = [values.get(name) for name in used]
    members: list[Member] = [member for block in document.blocks for member in block.members]
    members += [setting for profile in document.profiles for setting in profile.settings]
    while members:
        member = members.pop()
        if isinstance(member, BlockSyntax):
            members += member.members
        else:
            todo.append(member.value)
            members += [member.earlier] if member.earlier is not None else []
    read = set(used)
    while todo:
        expression = todo.pop()
        for path in paths_of(expression) if expression is not None else ():
            if path.text not in read:
                read.add(path.text)
                todo.append(values.get(path.text))
    names = [("param", param.name) for param in document.params] + [("let", let.name) for let in document.lets]
    return [
        Diagnostic(
            "W0201", "warning", f"nothing reads `{kind}.{name.text}`", name.span, help="delete it, or use it"
        )
        for kind, name in names
        if f"{kind}.{name.text}" not in read and name.span.file == root
    ]


class _Linker:
    def __init__(
        self, blocks: Mapping[str, Block], named: bool, complete: bool, problems: list[Diagnostic]
    ) -> None:
        self.blocks = blocks
        self.named = named
        self.complete = complete
        self.problems = problems

    def report(self, code: str, message: str, span: Span | None, **more: Any) -> None:
        self.problems.append(Diagnostic(code, "error", message, span, **more))

    def resolve(self, block: Block, top: Block) -> Block:
        settings = {
            name: replace(setting, value=self.reference(block, name, setting, setting.value, top))
            if isinstance(setting.value, Reference)
            else setting
            for name, setting in block.settings.items()
        }
        inner = {key: self.resolve(value, top) for key, value in block.blocks.items()}
        return replace(block, settings=settings, blocks=inner)

    def reference(
        self, block: Block, name: str, setting: Setting, reference: Reference, top: Block
    ) -> Reference:
        attr = schema.definition(block.type).attributes[name]
        uses = [use for alternative in attr.alternatives for use in alternative.get("x-reference", ())]
        target = self.blocks.get(reference.address)
        if target is None:
            self.unknown(reference, setting, uses)
            return reference
        if target.kind == "blend" and "split" in target.blocks and reference.facet is None:
            reference = Reference(reference.address, top.type.removeprefix("stage."))
        if not self.facet(reference, setting, target):
            return reference
        made = _made(target, reference.facet)
        if made not in uses:
            expected = takes(uses)
            what = {"policy": "a policy", "reward": "a reward model", "rows": "data"}.get(
                made, f"a `{made}` block"
            )
            places = (Label(target.span, f"`{reference}` is {what}"),) if target.span is not None else ()
            message = f"`{block.address}.{name}` takes {expected}, and `{reference}` is {what}"
            help = self.help_for(uses, target)
            self.report("E0204", message, setting.span, label=f"this is {what}", secondary=places, help=help)
        return reference

    def help_for(self, uses: list[str], target: Block) -> str | None:
        if "reward" in uses and target.kind == "model":
            return "write `head = scalar` if its weights hold a reward model, or refer to a reward stage"
        named = fitting(self.blocks, uses)
        return f"for example {listed(named[:3])}" if named else None

    def unknown(self, reference: Reference, setting: Setting, uses: list[str]) -> None:
        if not self.named:
            return
        named = fitting(self.blocks, uses)
        same = [
            address for address in self.blocks if address.split(".")[1:] == reference.address.split(".")[1:]
        ]
        near = nearest(reference.address, self.blocks) or [address for address in same if address in named]
        fixes: tuple[Fix, ...] = ()
        if near:
            help = f"did you mean {listed(near)}?"
            facet = f".{reference.facet}" if reference.facet else ""
            if setting.span is not None:
                fixes = tuple(rename(name + facet, setting.span) for name in near)
        else:
            help = f"there is {listed(named[:5])}" if named else "no block of that kind is in the recipe"
        message = f"there is no block `{reference.address}`"
        self.report("E0201", message, setting.span, help=help, fixes=fixes)

    def facet(self, reference: Reference, setting: Setting, target: Block) -> bool:
        """Whether the block has what the reference names behind its address."""
        facet = reference.facet
        places = (Label(target.span, f"`{target.address}`"),) if target.span is not None else ()
        if target.kind == "blend":
            split = target.blocks.get("split")
            parts = list(split.settings) if split is not None else []
            if facet is None or facet in parts:
                return True
            if not self.complete:
                return False
            near = nearest(facet, parts)
            help = f"did you mean {listed(near)}?" if near else f"its parts: {', '.join(parts)}"
            if not parts:
                help = "it has no `split`, so it is read whole: write its address alone"
            own = setting.value.facet is None
            message = f"`{target.address}` has no part `{facet}`" + (
                ", which is the part that this stage reads when none is named" if own else ""
            )
            self.report("E0603", message, setting.span, secondary=places, help=help)
            return False
        made_beside = {"ema": "actor", "critic": "critic"}
        facets = [name for name, engine in made_beside.items() if engine in schema.definition(target.type).blocks]
        if facet is None:
            return True
        if facet not in facets:
            has = f"it has: {', '.join(facets)}" if facets else f"write `{target.address}`"
            message = f"`{target.address}` has no `{facet}`"
            self.report("E0202", message, setting.span, secondary=places, help=has)
            return False
        actor = target.blocks.get("actor")
        if facet == "ema" and actor is not None and actor["ema"] is None:
            help = "write for example `ema = 0.992` in its actor"
            self.report(
                "E0202", f"`{target.address}` keeps no `ema`", setting.span, secondary=places, help=help
            )
            return False
        return True


def _made(block: Block, facet: str | None) -> str:
    """What a reference to a block gives: policy, reward, rows or parallel; else the block's kind."""
    if block.kind == "model":
        return "reward" if block["head"] == "scalar" else "policy"
    if block.kind == "stage":
        return "reward" if block.type == "stage.reward" or facet == "critic" else "policy"
    return "rows" if block.kind in ("data", "blend") else block.kind
