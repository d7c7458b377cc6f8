"""Settings over settings: a copy over its source, an override over the base, a profile and --set over the file.

The stronger attribute takes the place of the weaker one and keeps it as `earlier`. Inner blocks are merged by
their names; lists and blocks of shares are replaced whole. An attribute that excludes another displaces it, and with it
what has an effect only beside that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rlhfdsl.language import schema
from rlhfdsl.language.diagnostics import Diagnostic, Fix, Label, Span
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.language.syntax import (
    Attribute,
    BlockSyntax,
    Document,
    Member,
    Override,
    Param,
    Path,
    Word,
    WrittenLayer,
    address_of,
    key_of,
    type_of,
)
from rlhfdsl.language.values import rename

Members = tuple[Member, ...]


def merge(old: Members, new: Members, type_: str, whole: bool = True) -> Members:
    """`new` over `old` in a block of a type; `whole` replaces a block of shares, else it is merged too."""
    definition = schema.definition(type_) if type_ in schema.types() else None
    written = {key_of(member) for member in new}
    displaced: set[str] = set()
    if definition is not None:
        displaced = {name for group in definition.exclusive if written & set(group) for name in group} - written
        beside = {name for name, needs in definition.needs.items() if displaced & set(needs)}
        displaced |= beside - set(definition.one_of) - written
    kept = [member for member in old if key_of(member) not in displaced]
    places = {key_of(member): index for index, member in enumerate(kept)}
    for member in new:
        at = places.pop(key_of(member), None)  # a second member of one name stays: check reports it
        before = kept[at] if at is not None else None
        if isinstance(member, Attribute) and isinstance(before, Attribute) and at is not None:
            kept[at] = _before(member, before)
        elif isinstance(member, BlockSyntax) and isinstance(before, BlockSyntax) and at is not None:
            inner = definition.blocks.get(member.kind.text) if definition is not None else None
            shares = inner is not None and "x-sum" in schema.definition(inner[0]).table
            if not (shares and whole):
                members = merge(before.members, member.members, inner[0] if inner else "", whole)
                member = replace(member, members=members, broken=member.broken or before.broken)
            kept[at] = member
        else:
            kept.append(member)
    return tuple(kept)


def _before(member: Attribute, weaker: Attribute) -> Attribute:
    """The attribute with a weaker one behind all that it has replaced so far."""
    earlier = weaker if member.earlier is None else _before(member.earlier, weaker)
    return replace(member, earlier=earlier)


def nest(words: Sequence[Word], members: Members, type_: str, span: Span) -> Members:
    """`members` inside the inner blocks that a path leads to; `mix.PART` is one block."""
    if not words:
        return members
    blocks = schema.definition(type_).blocks if type_ in schema.types() else {}
    inner = blocks[words[0].text][0] if words[0].text in blocks else ""
    named = bool(inner) and schema.definition(inner).label == "name?" and len(words) > 1
    labels = (words[1],) if named else ()
    deeper = nest(words[2 if named else 1 :], members, inner, span)
    return (BlockSyntax(words[0], labels, deeper, span, span),)


def relayer(document: Document, layer: WrittenLayer) -> Document:
    """The document with every setting of its file in another layer."""

    def change(member: Member) -> Member:
        if isinstance(member, BlockSyntax):
            return replace(member, members=tuple(change(inner) for inner in member.members))
        return replace(member, layer=layer) if member.layer == "file" else member

    blocks = tuple(
        replace(block, members=tuple(change(member) for member in block.members)) for block in document.blocks
    )
    return replace(document, blocks=blocks)


def extend(base: Document, own: Document) -> Document:
    """A file over the one that it extends; it has a `recipe` block of its own, which the base's stands behind.

    The base's `output` is the base's own: two recipes do not write to one folder.
    """
    mine, theirs = (
        next((block for block in document.blocks if block.kind.text == "recipe"), None) for document in (own, base)
    )
    if mine is not None and theirs is not None:
        passed = tuple(member for member in theirs.members if key_of(member) != "output")
        over = replace(mine, members=merge(passed, mine.members, "recipe"))
        own = replace(own, blocks=tuple(over if block is mine else block for block in own.blocks))
    return join(replace(base, blocks=tuple(block for block in base.blocks if block.kind.text != "recipe")), own)


def join(other: Document, own: Document) -> Document:
    """What another file says, and then what a file says itself; a mistake in one of them is one in the whole."""
    return replace(
        own,
        blocks=(*other.blocks, *own.blocks),
        params=(*other.params, *own.params),
        lets=(*other.lets, *own.lets),
        profiles=(*other.profiles, *own.profiles),
        broken=own.broken or other.broken,
        misnested=own.misnested or other.misnested,
        lost=own.lost or other.lost,
    )


def apply_overrides(document: Document, included: Mapping[str, Span], problems: list[Diagnostic]) -> Document:
    """The overrides of a file on what it includes; `included` are the addresses there, `param.x` too."""
    problems += _twice(document.overrides)
    for override in document.overrides:
        words = override.path.words
        if words[0].text == "param" and len(words) == 1:
            document = _params(document, override, included, problems)
            continue
        address = ".".join(word.text for word in words[:2])
        if address not in included:
            _no_target(document, override.path, address, included, problems)
            continue
        blocks = list(document.blocks)
        at = next(index for index, block in enumerate(blocks) if address_of(block) == address)
        type_ = type_of(blocks[at])
        members = nest(words[2:], override.members, type_, override.path.span)
        broken = blocks[at].broken or override.broken
        blocks[at] = replace(blocks[at], members=merge(blocks[at].members, members, type_), broken=broken)
        document = replace(document, blocks=tuple(blocks))
    return replace(document, overrides=())


def _twice(overrides: Sequence[Override]) -> Iterator[Diagnostic]:
    """What two overrides of one file say both; of a setting that is twice in one block, check tells."""
    first: dict[str, tuple[Override, Span]] = {}
    for override in overrides:
        for path, span in _said(override.path.text, override.members):
            other, place = first.setdefault(path, (override, span))
            if place != span and (other is not override or override.path.text == "param"):
                label = (Label(place, "the first one"),)
                message = f"`{path}` is overridden twice"
                help = "keep one of them"
                yield Diagnostic("E0403", "error", message, span, "the second one", label, help=help)


def _said(path: str, members: Members) -> Iterator[tuple[str, Span]]:
    """The paths of the settings in a block at `path`, and where each stands."""
    for member in members:
        if isinstance(member, BlockSyntax):
            yield from _said(f"{path}.{key_of(member)}", member.members)
        else:
            yield f"{path}.{member.path.text}", member.path.span


def _params(
    document: Document, override: Override, included: Mapping[str, Span], problems: list[Diagnostic]
) -> Document:
    """`override param { seed = 7 }`: other defaults for the parameters of an included file."""
    for member in override.members:
        if isinstance(member, BlockSyntax):
            message = "`override param` holds `name = value`, not blocks"
            problems.append(Diagnostic("E0302", "error", message, member.header, help="write `name = value`"))
        elif f"param.{member.path.text}" not in included:
            _no_target(document, member.path, f"param.{member.path.text}", included, problems)
        else:
            document = replace(document, params=redefault(document.params, member.path.text, member))
    return document


def redefault(params: tuple[Param, ...], name: str, attribute: Attribute) -> tuple[Param, ...]:
    """The parameters, one of them with another default, before which its own stands."""
    return tuple(
        replace(param, default=attribute.value, earlier=param) if param.name.text == name else param
        for param in params
    )


def _no_target(
    document: Document, path: Path, address: str, included: Mapping[str, Span], problems: list[Diagnostic]
) -> None:
    own = next((block for block in document.blocks if address_of(block) == address), None)
    labels: tuple[Label, ...] = ()
    fixes: tuple[Fix, ...] = ()
    if address == "recipe":
        message = "`recipe` cannot be overridden: each file has a `recipe` block of its own"
        help = "write the setting in the `recipe` block of this file"
        if own is None:
            help = 'write `recipe "my-run" { … }` in its place'
    elif own is not None:
        message = f"`{address}` is written in this file, so it needs no override"
        help = "change it where it stands"
        labels = (Label(own.header, "it stands here"),)
    elif document.lost:
        return
    elif not included:
        message = "an override changes what an included file says, and this file includes none"
        help = 'write `extends "base.rlhf"` first'
    else:
        near = nearest(address, included)
        message = f"no included file has `{address}`"
        help = f"did you mean {listed(near)}?" if near else f"there is {listed(list(included)[:6])}"
        if near and address.count(".") == near[0].count(".") and path.words[0].text != "param":
            span = Span(path.span.file, path.span.start, path.words[min(1, len(path.words) - 1)].span.end)
            fixes = tuple(rename(name, span) for name in near)
    problems.append(Diagnostic("E0213", "error", message, path.span, "", labels, help=help, fixes=fixes))


def _lacking(block: BlockSyntax) -> BlockSyntax:
    """A block of which it is not told what it lacks, nor of those in it: what it was to be made from has that."""
    members = (_lacking(member) if isinstance(member, BlockSyntax) else member for member in block.members)
    return replace(block, members=tuple(members), broken=True)


def copy_blocks(document: Document, problems: list[Diagnostic]) -> Document:
    """The document with each `from` carried out: what the source says, and what the copy says over it."""
    if not any(block.copied for block in document.blocks):
        return document
    known = {address_of(block): block for block in reversed(document.blocks)}
    done: dict[str, BlockSyntax] = {}
    open_: list[str] = []

    def copy(block: BlockSyntax) -> BlockSyntax:
        address = address_of(block)
        if block.copied is None:
            return block
        if known.get(address) is block and address in done:
            return done[address]
        source = known.get(block.copied.text)
        bare = _lacking(replace(block, copied=None))
        if source is None:
            if not document.lost:
                near = nearest(block.copied.text, known)
                help = f"did you mean {listed(near)}?" if near else "write the address of a block: `stage.ppo`"
                fixes = tuple(rename(name, block.copied.span) for name in near)
                message = f"there is no block `{block.copied.text}`"
                problems.append(
                    Diagnostic("E0201", "error", message, block.copied.span, help=help, fixes=fixes)
                )
            return bare
        if type_of(source) != type_of(block):
            message = f"a `{type_of(block).replace('.', ' ')}` is not made from `{address_of(source)}`"
            places = (Label(source.header, f"a `{type_of(source).replace('.', ' ')}`"),)
            help = "copy a block of the same kind"
            problems.append(Diagnostic("E0214", "error", message, block.copied.span, "", places, help=help))
            return bare
        if address in open_ or source is block:
            through = open_[open_.index(address) :] if address in open_ else [address]
            circle = " -> ".join([*through, address])
            message = f"blocks are made from each other: {circle}"
            problems.append(Diagnostic("E0215", "error", message, block.copied.span, "this closes the circle"))
            return bare
        open_.append(address)
        full = copy(source)
        open_.pop()
        members = merge(full.members, block.members, type_of(block))
        made = replace(block, members=members, copied=None, broken=block.broken or full.broken)
        if known.get(address) is block:
            done[address] = made
        return made

    return replace(document, blocks=tuple(copy(block) for block in document.blocks))
