"""Arguments of the command line: `--set PATH=VALUE` into the syntax tree, `-p NAME=VALUE` as a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlhfdsl.language import schema
from rlhfdsl.language.check import address_of
from rlhfdsl.language.diagnostics import Diagnostic, Span
from rlhfdsl.language.evaluate import Given
from rlhfdsl.language.parser import parse_assignment
from rlhfdsl.language.schema import Attr
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.language.syntax import Attribute, BlockSyntax, Document, Expression, Param, Path, Text, Word


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
                help = (
                    f"did you mean {listed(near)}?" if near else f"parameters: {', '.join(known) or 'none'}"
                )
                problems.append(
                    Diagnostic("E0501", "error", f"there is no parameter `{name}`", whole, help=help)
                )
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
    """The document with each --set argument in place of what the file says; the last of one path wins."""
    problems: list[Diagnostic] = []
    for number, text in enumerate(sets, 1):
        source = SourceFile("--set" if len(sets) == 1 else f"--set #{number}", text.strip())
        sources[source.name] = source
        document, wrong = _apply(document, source)
        problems += wrong
    return document, problems


def _apply(document: Document, source: SourceFile) -> tuple[Document, list[Diagnostic]]:
    left, equals, _ = source.text.partition("=")
    words = [word.strip() for word in left.split(".")]
    path_span = Span(source.name, 0, len(left.rstrip()))
    if not equals or not all(word.isidentifier() for word in words):
        help = "write --set PATH=VALUE, for example --set stage.ppo.kl.coef=0.05"
        whole = Span(source.name, 0, len(source.text))
        return document, [
            Diagnostic("E0503", "error", f"`{source.text}` is not PATH=VALUE", whole, help=help)
        ]
    tops = {address_of(block): index for index, block in enumerate(document.blocks)}
    address = next((a for n in (2, 1) if (a := ".".join(words[:n])) in tops and len(words) > n), None)
    if address is None:
        return document, _no_path(document, path_span, ".".join(words[:2]), list(tops))
    block = document.blocks[tops[address]]
    rest = words[address.count(".") + 1 :]
    type_ = f"stage.{_label(block)}" if block.kind.text == "stage" else block.kind.text
    if type_ not in schema.types():
        return document, []  # the block's own mistake is reported where it stands
    attr, blocks = _find(type_, rest)
    if attr is None:
        known = list(schema.definition(type_).attributes)
        return document, _no_path(
            document, path_span, ".".join(words), [f"{address}.{name}" for name in known]
        )
    value = Span(source.name, len(left) + 1, len(source.text))
    shapes = {schema.shape(alternative) for alternative in attr.alternatives}
    symbols = [str(word) for alternative in attr.alternatives for word in alternative.get("enum", ())]
    expression, problems = _argument(source, value, bool(shapes & {"text", "source"}), symbols)
    if expression is None:
        return document, problems
    name = Word(rest[-1], Span(source.name, path_span.end - len(rest[-1]), path_span.end))
    attribute = Attribute(Path((name,), name.span), expression, Span(source.name, 0, len(source.text)), "set")
    changed = list(document.blocks)
    changed[tops[address]] = _with(block, blocks, attribute)
    return replace(document, blocks=tuple(changed)), []


def _find(type_: str, rest: Sequence[str]) -> tuple[Attr | None, list[str]]:
    """The attribute at a path inside a block, and the inner blocks on the way (`mix.PART` counts as one)."""
    blocks: list[str] = []
    words = list(rest)
    while words:
        definition = schema.definition(type_)
        if len(words) == 1:
            return definition.attributes.get(words[0]) or definition.free, blocks
        if words[0] not in definition.blocks:
            return None, blocks
        type_ = definition.blocks[words[0]][0]
        named = schema.definition(type_).label == "name?" and len(words) > 2
        blocks.append(".".join(words[:2]) if named else words[0])
        del words[: 2 if named else 1]
    return None, blocks


def _with(block: BlockSyntax, path: Sequence[str], attribute: Attribute) -> BlockSyntax:
    """The block with the attribute set in it, or in the inner block that the path leads to."""
    if not path:
        kept = tuple(
            member
            for member in block.members
            if not (isinstance(member, Attribute) and member.path.text == attribute.path.text)
        )
        return replace(block, members=(*kept, attribute))
    kind, _, part = path[0].partition(".")
    members = list(block.members)
    for index, member in enumerate(members):
        if isinstance(member, BlockSyntax) and member.kind.text == kind and _label(member) == part:
            members[index] = _with(member, path[1:], attribute)
            return replace(block, members=tuple(members))
    span = attribute.span
    labels = (Word(part, span),) if part else ()
    fresh = BlockSyntax(Word(kind, span), labels, (), span, span)
    return replace(block, members=(*members, _with(fresh, path[1:], attribute)))


def _label(block: BlockSyntax) -> str:
    """The first name of a block when it is a bare word: a stage's kind, a mix's part."""
    return block.labels[0].text if block.labels and isinstance(block.labels[0], Word) else ""


def _argument(
    source: SourceFile, value: Span, takes_text: bool, symbols: Sequence[str]
) -> tuple[Expression | None, list[Diagnostic]]:
    """The value of an argument: an expression of the language, or for a text what the shell left of it."""
    attribute, problems = parse_assignment(source)
    parsed = attribute.value if attribute is not None else None
    if takes_text and not isinstance(parsed, Text):
        symbol = isinstance(parsed, Word) and parsed.text in symbols
        parameter = isinstance(parsed, Path) and parsed.words[0].text == "param"
        if not symbol and not parameter:
            return Text(source.slice(value), value), []
    return parsed, problems


def _no_path(document: Document, span: Span, path: str, known: Sequence[str]) -> list[Diagnostic]:
    if document.broken:
        return []
    near = nearest(path, known)
    help = f"did you mean {listed(near)}?" if near else f"there is {listed(list(known)[:8])}"
    return [Diagnostic("E0504", "error", f"`{path}` names no attribute of this recipe", span, help=help)]
