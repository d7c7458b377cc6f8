"""What can be written at a cursor, from the table of the language and the names of the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rlhfdsl.language import schema
from rlhfdsl.language.compile import Compilation
from rlhfdsl.language.evaluate import TYPES
from rlhfdsl.language.explain import default_text
from rlhfdsl.language.link import fitting
from rlhfdsl.language.recipe import Block
from rlhfdsl.language.rules import COLUMNS
from rlhfdsl.language.schema import Attr
from rlhfdsl.language.settings import attributes_of
from rlhfdsl.language.values import type_words
from rlhfdsl.lsp.context import Context, context_at

Kind = Literal["block", "attribute", "symbol", "reference", "variable", "keyword", "value"]

_FORMS = {
    "param": ("a value given on the command line", "param ${1:name}: ${2:int} = ${3:1}"),
    "let": ("a named calculation", "let ${1:name} = ${2:1}"),
    "profile": ("settings for `--profile`", "profile ${1:debug} {\n  $0\n}"),
    "override": ("change what an included file says", "override ${1:stage.sft} {\n  $0\n}"),
    "extends": ("begin from another recipe", 'extends "${1:base.rlhf}"'),
    "import": ("use the blocks of another file", 'import "${1:models.rlhf}" as ${2:m}'),
}


@dataclass(frozen=True, slots=True)
class Item:
    """A completion: what is shown, what is put in place of the typed word (a snippet), and its doc."""

    label: str
    insert: str
    kind: Kind
    detail: str = ""
    doc: str = ""


def complete(text: str, offset: int, compilation: Compilation) -> tuple[str, list[Item]]:
    """The typed word that ends at the offset, and what can stand in its place."""
    context = context_at(text, offset)
    items = {
        "top": _top, "label": _label, "from": _from, "param type": _types, "path": _path, "name": _names,
        "value": _values, "include": _none, "nothing": _none,
    }[context.where](context, compilation)  # fmt: skip
    return context.prefix, list(items)


def _none(context: Context, compilation: Compilation) -> Iterator[Item]:
    yield from ()


def _top(context: Context, compilation: Compilation) -> Iterator[Item]:
    for kind in schema.kinds():
        if kind == "stage":
            for stage in schema.stage_kinds():
                definition = schema.definition(f"stage.{stage}")
                body = _required(definition)
                doc = definition.table["description"]
                yield Item(f"stage {stage}", f"stage {stage} {{\n{body}}}", "block", "block", doc)
            continue
        definition = schema.definition(kind)
        name = '"${1:my-run}"' if definition.label == "text" else "${1:name}"
        body, doc = _required(definition, 2), definition.table["description"]
        yield Item(kind, f"{kind} {name} {{\n{body}}}", "block", "block", doc)
    for word, (doc, form) in _FORMS.items():
        yield Item(word, form, "keyword", "form", doc)


def _required(definition: schema.Definition, first: int = 1) -> str:
    """The lines of what a block must have, as a snippet."""
    names = [*definition.required, *definition.one_of[:1]]
    width = max((len(name) for name in names if name in definition.attributes), default=0)
    lines = []
    for number, name in enumerate(names, first):
        if name in definition.attributes:
            example = str(definition.attributes[name].table["examples"][0]).replace("}", "\\}")
            lines.append(f"  {name:<{width}} = ${{{number}:{example}}}\n")
        else:
            lines.append(f"  {name} {{ ${number} }}\n")
    return "".join(lines) or "  $0\n"


def _label(context: Context, compilation: Compilation) -> Iterator[Item]:
    if context.statement[0] == "stage":
        for kind in schema.stage_kinds():
            yield Item(kind, kind, "symbol", "kind of stage", schema.definition(f"stage.{kind}").table["description"])


def _from(context: Context, compilation: Compilation) -> Iterator[Item]:
    kind = context.statement[0]
    wanted = f"stage.{context.statement[1]}" if kind == "stage" and len(context.statement) > 2 else kind
    for address, block in (compilation.blocks or {}).items():
        if block.type == wanted:
            yield Item(address, address, "reference", block.type)


def _types(context: Context, compilation: Compilation) -> Iterator[Item]:
    for name in TYPES:
        yield Item(name, name, "symbol", "type")


def _path(context: Context, compilation: Compilation) -> Iterator[Item]:
    document = compilation.document
    for address, block in (compilation.blocks or {}).items():
        if context.statement[:1] == ("override",):
            yield Item(address, address, "reference", block.type)
            continue
        for name in attributes_of(block.type):
            yield Item(f"{address}.{name}", f"{address}.{name} = ", "attribute", block.type)
    for param in document.params if document is not None and context.blocks else ():
        yield Item(f"param.{param.name.text}", f"param.{param.name.text} = ", "variable", "parameter")


def _names(context: Context, compilation: Compilation) -> Iterator[Item]:
    type_ = context.type or _overridden(context, compilation)
    if type_ is None:
        return
    definition = schema.definition(type_)
    if definition.free is not None:
        for name in _free(context, compilation):
            if name not in context.taken:
                yield Item(name, f"{name} = ", "attribute")
        return
    out = {name for group in definition.exclusive for name in group if context.taken & set(group)}
    for name, attr in definition.attributes.items():
        if name in context.taken or name in out:
            continue
        default = default_text(attr, name in definition.required)
        detail = type_words(attr) + (f", default {default}" if default else "")
        yield Item(name, f"{name} = ", "attribute", detail, attr.doc)
    for name, (inner, _) in definition.blocks.items():
        if name not in context.taken or schema.definition(inner).label == "name?":
            yield Item(name, f"{name} {{ $0 }}", "block", "block", schema.definition(inner).table["description"])


def _overridden(context: Context, compilation: Compilation) -> str | None:
    """The type inside `override stage.NAME`, which only the recipe tells."""
    head = context.blocks[0] if context.blocks else ()
    if len(head) < 2 or head[0] != "override":
        return None
    words = head[1].split(".")
    block: Block | None = (compilation.blocks or {}).get(".".join(words[:2]))
    for name in (*words[2:], *(inner[0] for inner in context.blocks[1:] if inner)):
        block = block.blocks.get(name) if block is not None else None
    return block.type if block is not None else None


def _free(context: Context, compilation: Compilation) -> list[str]:
    """Names that make sense in a block whose names are the writer's."""
    name = context.blocks[-1][0] if context.blocks[-1] else ""  # a `{` too many opens a block without a name
    blocks: Mapping[str, Block] = compilation.blocks or {}
    if name in schema.naming():
        kind = f"{schema.naming()[name]}."
        return [address.removeprefix(kind) for address in blocks if address.startswith(kind)]
    if name == "split":
        return [*schema.stage_kinds(), "eval"]
    outer = ".".join(context.blocks[0][:2])
    form = blocks[outer]["format"] if outer in blocks else None
    return list(COLUMNS.get(form, ())) if isinstance(form, str) else []


def _values(context: Context, compilation: Compilation) -> Iterator[Item]:
    type_ = context.type or _overridden(context, compilation)
    attr: Attr | None = None
    if context.kind == "profile":
        attr = _of_path(context.attribute, compilation)
    elif type_ is not None:
        definition = schema.definition(type_)
        attr = definition.attributes.get(context.attribute) or definition.free
    yield from _of_attribute(attr, compilation) if attr is not None else ()
    yield from _variables(compilation)


def _of_path(path: str, compilation: Compilation) -> Attr | None:
    words = path.split(".")
    block = (compilation.blocks or {}).get(".".join(words[:2]))
    for name in words[2:-1]:
        block = block.blocks.get(name) if block is not None else None
    return schema.definition(block.type).attributes.get(words[-1]) if block is not None else None


def _of_attribute(attr: Attr, compilation: Compilation) -> Iterator[Item]:
    blocks = compilation.blocks or {}
    for alternative in attr.alternatives:
        match schema.shape(alternative):
            case "symbol":
                for word in alternative["enum"]:
                    yield Item(str(word), str(word), "symbol", attr.name, attr.doc)
            case "switch":
                for word in ("on", "off"):
                    yield Item(word, word, "symbol", attr.name, attr.doc)
            case "none":
                word = schema.none_word(alternative)
                yield Item(word, word, "symbol", attr.name, attr.doc)
            case "reference":
                for address in fitting(blocks, alternative["x-reference"]):
                    yield Item(address, address, "reference", blocks[address].type)
                    split = blocks[address].blocks.get("split")
                    for part in split.settings if split is not None else ():
                        yield Item(f"{address}.{part}", f"{address}.{part}", "reference", "part of a blend")
            case _:
                for example in attr.table["examples"]:
                    yield Item(str(example), str(example), "value", "example", attr.doc)


def _variables(compilation: Compilation) -> Iterator[Item]:
    document = compilation.document
    if document is not None:
        for param in document.params:
            types = " | ".join(word.text for word in param.types)
            yield Item(f"param.{param.name.text}", f"param.{param.name.text}", "variable", types)
        for let in document.lets:
            yield Item(f"let.{let.name.text}", f"let.{let.name.text}", "variable", "let")
