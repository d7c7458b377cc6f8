"""Settings by their address: a profile's and `--set PATH=VALUE` into the tree; `-p NAME=VALUE` as a value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from rlhfdsl.language import schema
from rlhfdsl.language.diagnostics import Diagnostic, Label, Span
from rlhfdsl.language.evaluate import Given
from rlhfdsl.language.layers import merge, nest, redefault
from rlhfdsl.language.parser import parse_assignment
from rlhfdsl.language.schema import Attr
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.language.syntax import (
    Attribute,
    Document,
    Expression,
    Param,
    Path,
    Profile,
    Text,
    Word,
    address_of,
    type_of,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an address leads: a block of the document, the words behind it, and what takes the value.

    `attr` is None when the type of the block is not known, or when the words behind it name no attribute.
    """

    index: int
    type: str
    inner: tuple[Word, ...]
    name: Word
    attr: Attr | None


def give_params(
    params: Mapping[str, str], known: Mapping[str, Param], complete: bool, sources: dict[str, SourceFile]
) -> tuple[dict[str, Given], list[Diagnostic]]:
    """The -p arguments as expressions; a text parameter takes its argument as it is, quotes or none."""
    given: dict[str, Given] = {}
    problems: list[Diagnostic] = []
    for name, text in params.items():
        source = SourceFile(f"-p {name}", f"{name}={text.strip()}")
        sources[source.name] = source
        whole = Span(source.name, 0, len(source.text))
        param = known.get(name)
        if param is None:
            if complete:
                near = nearest(name, known)
                help = f"parameters: {', '.join(known) or 'none'}"
                help = f"did you mean {listed(near)}?" if near else help
                message = f"there is no parameter `{name}`"
                problems.append(Diagnostic("E0501", "error", message, whole, help=help))
            continue
        value = Span(source.name, len(name) + 1, len(source.text))
        takes_text = any(word.text == "text" for word in param.types)
        expression, wrong = _argument(source, value, takes_text, [])
        problems += wrong
        if expression is not None:
            given[name] = Given(expression, value)
    return given, problems


def apply_sets(
    document: Document, sets: Sequence[str], sources: dict[str, SourceFile]
) -> tuple[Document, list[Diagnostic]]:
    """The document with each --set argument over what the files say; the last of one path wins."""
    problems: list[Diagnostic] = []
    for number, text in enumerate(sets, 1):
        source = SourceFile("--set" if len(sets) == 1 else f"--set #{number}", text.strip())
        sources[source.name] = source
        document, wrong = _apply(document, source)
        problems += wrong
    return document, problems


def apply_profile(
    document: Document, chosen: str | None
) -> tuple[Document, list[tuple[Attr, Attribute]], list[Diagnostic]]:
    """The document with a profile over the file; and what the other profiles would set, to be checked too."""
    problems: list[Diagnostic] = []
    idle: list[tuple[Attr, Attribute]] = []
    names = {profile.name.text for profile in document.profiles}
    if chosen is not None and chosen not in names and not document.lost:
        near = nearest(chosen, names)
        help = f"did you mean {listed(near)}?" if near else f"profiles: {', '.join(sorted(names)) or 'none'}"
        problems.append(Diagnostic("E0508", "error", f"there is no profile `{chosen}`", help=help))
    for profile in document.profiles:
        problems += _twice(profile)
        for attribute in profile.settings:
            words = attribute.path.words
            if words[0].text == "param" and len(words) == 2:
                if words[1].text not in {param.name.text for param in document.params}:
                    known = [f"param.{param.name.text}" for param in document.params]
                    problems += _no_path(document, attribute.path.span, attribute.path.text, known)
                elif profile.name.text == chosen:
                    document = replace(
                        document, params=redefault(document.params, words[1].text, attribute)
                    )
                continue
            place, wrong = find(document, attribute.path)
            problems += wrong
            if place is None or place.attr is None:
                continue
            if profile.name.text == chosen:
                document = _put(document, place, attribute)
            else:
                idle.append((place.attr, attribute))
    return document, idle, problems


def _twice(profile: Profile) -> list[Diagnostic]:
    seen: dict[str, Attribute] = {}
    problems = []
    for attribute in profile.settings:
        first = seen.setdefault(attribute.path.text, attribute)
        if first is not attribute:
            message = f"`{attribute.path.text}` is written twice in the profile `{profile.name.text}`"
            label = (Label(first.path.span, "the first one"),)
            help = "keep one of them"
            problems.append(
                Diagnostic("E0403", "error", message, attribute.path.span, "the second one", label, help=help)
            )
    return problems


def find(document: Document, path: Path) -> tuple[Place | None, list[Diagnostic]]:
    """Where a path of a profile or of --set leads, or why nowhere."""
    words = path.words
    tops: dict[str, int] = {}
    for index, block in enumerate(document.blocks):
        tops.setdefault(address_of(block), index)
    lengths = range(len(words) - 1, 0, -1)
    cut = next((n for n in lengths if ".".join(word.text for word in words[:n]) in tops), None)
    if cut is None:
        head = ".".join(word.text for word in words[:2])
        if path.text in tops:
            type_ = type_of(document.blocks[tops[path.text]])
            return None, _block(document, path, attributes_of(type_) if type_ in schema.types() else ())
        return None, _no_path(document, path.span, head, list(tops))
    address = ".".join(word.text for word in words[:cut])
    type_ = type_of(document.blocks[tops[address]])
    if type_ not in schema.types():
        return None, []  # the block's own mistake is reported where it stands
    imports = {top.split(".")[1] for top in tops if top.count(".") == 2}
    attr, inner, name = _attribute(type_, words[cut:], imports)
    if attr is None:
        known = [f"{address}.{n}" for n in attributes_of(type_)]
        for word in words[cut:]:
            if word.text not in schema.definition(type_).blocks:
                return None, _no_path(document, path.span, path.text, known)
            type_ = schema.definition(type_).blocks[word.text][0]
        return None, _block(document, path, attributes_of(type_) or ("NAME",))
    return Place(tops[address], type_, inner, name, attr), []


def attributes_of(type_: str, before: str = "") -> list[str]:
    """The dotted names of every attribute of a type, those of its inner blocks too."""
    definition = schema.definition(type_)
    names = [before + name for name in definition.attributes]
    for block, (inner, _) in definition.blocks.items():
        names += attributes_of(inner, f"{before}{block}.")
    return names


def _attribute(
    type_: str, rest: Sequence[Word], imports: Collection[str]
) -> tuple[Attr | None, tuple[Word, ...], Word]:
    """The attribute at a path inside a block, the words of the inner blocks on the way, and its name."""
    words, inner = list(rest), list[Word]()
    while len(words) > 1 and words[0].text in schema.definition(type_).blocks:
        type_ = schema.definition(type_).blocks[words[0].text][0]
        own = len(words) > 3 or (len(words) == 3 and words[1].text not in imports)
        named = schema.definition(type_).label == "name?" and own  # `mix.PART.x`, not `mix.m.x`
        inner += words[: 2 if named else 1]
        del words[: 2 if named else 1]
    definition = schema.definition(type_)
    span = Span(words[0].span.file, words[0].span.start, words[-1].span.end)
    name = Word(".".join(word.text for word in words), span)
    attr = definition.attributes.get(name.text)
    if attr is None and definition.free is not None:
        attr = replace(definition.free, name=name.text)
    return attr, tuple(inner), name


def _put(document: Document, place: Place, attribute: Attribute) -> Document:
    """The document with an attribute at a place."""
    attribute = replace(attribute, path=Path((place.name,), place.name.span))
    blocks = list(document.blocks)
    block = blocks[place.index]
    members = nest(place.inner, (attribute,), place.type, attribute.span)
    blocks[place.index] = replace(block, members=merge(block.members, members, place.type, whole=False))
    return replace(document, blocks=tuple(blocks))


def _apply(document: Document, source: SourceFile) -> tuple[Document, list[Diagnostic]]:
    left, equals, _ = source.text.partition("=")
    words: list[Word] = []
    at = 0
    for part in left.rstrip().split("."):
        start = at + len(part) - len(part.lstrip())
        words.append(Word(part.strip(), Span(source.name, start, start + len(part.strip()))))
        at += len(part) + 1
    if not equals or not all(word.text.isidentifier() for word in words):
        help = "write --set PATH=VALUE, for example --set stage.ppo.kl.coef=0.05"
        whole = Span(source.name, 0, len(source.text))
        message = f"`{source.text}` is not PATH=VALUE"
        return document, [Diagnostic("E0503", "error", message, whole, help=help)]
    path = Path(tuple(words), Span(source.name, 0, len(left.rstrip())))
    place, problems = find(document, path)
    if place is None or place.attr is None:
        return document, problems
    value = Span(source.name, len(left) + 1, len(source.text))
    shapes = {schema.shape(alternative) for alternative in place.attr.alternatives}
    symbols = [str(word) for alternative in place.attr.alternatives for word in alternative.get("enum", ())]
    expression, problems = _argument(source, value, bool(shapes & {"text", "source"}), symbols)
    if expression is None:
        return document, problems
    attribute = Attribute(path, expression, Span(source.name, 0, len(source.text)), "set")
    return _put(document, place, attribute), []


def _argument(
    source: SourceFile, value: Span, takes_text: bool, symbols: Sequence[str]
) -> tuple[Expression | None, list[Diagnostic]]:
    """The value of an argument: an expression of the language, or for a text what the shell left of it."""
    attribute, problems = parse_assignment(source)
    parsed = attribute.value if attribute is not None else None
    if takes_text and not isinstance(parsed, Text):
        symbol = isinstance(parsed, Word) and parsed.text in symbols
        named = isinstance(parsed, Path) and parsed.words[0].text in ("param", "let")
        if not symbol and not named:
            return Text(source.slice(value), value), []
    return parsed, problems


def _block(document: Document, path: Path, inside: Sequence[str]) -> list[Diagnostic]:
    """Of a path that leads to a block, with the names of the attributes in it."""
    help = "name an attribute in it" + (f", for example `{path.text}.{inside[0]}`" if inside else "")
    message = f"`{path.text}` is a block, and no attribute of this recipe"
    return [] if document.lost else [Diagnostic("E0504", "error", message, path.span, help=help)]


def _no_path(document: Document, span: Span, path: str, known: Sequence[str]) -> list[Diagnostic]:
    if document.lost:
        return []
    head, _, last = path.rpartition(".")
    deeper = [name for name in known if name.startswith(head + ".") and name.endswith("." + last)]
    near = deeper or nearest(path, known)
    help = f"did you mean {listed(near)}?" if near else f"there is {listed(list(known)[:8])}"
    if path.startswith("param.") and span.file.startswith("--set"):
        help = "a parameter is given by `-p NAME=VALUE`"
    return [Diagnostic("E0504", "error", f"`{path}` names no attribute of this recipe", span, help=help)]
