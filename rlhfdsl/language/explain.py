"""What one address of a recipe is: value, type, default, the chain of its origins, what it becomes."""

from __future__ import annotations

from typing import Any

from rlhfdsl.language import schema
from rlhfdsl.language.check import place
from rlhfdsl.language.compile import Compilation
from rlhfdsl.language.describe import written
from rlhfdsl.language.evaluate import Evaluator
from rlhfdsl.language.presence import shown
from rlhfdsl.language.recipe import Block, Origin, Reference, Setting, Source, find_block
from rlhfdsl.language.schema import Attr
from rlhfdsl.language.syntax import Expression, Let, Param, paths_of
from rlhfdsl.language.values import INVALID, type_words

Json = dict[str, Any]


def explain(compilation: Compilation, address: str) -> Json | None:
    """The facts about a setting, a block, a parameter or a `let`; None when the recipe has no such address.

    `what` tells which of them it is; addresses are those that messages and --set use.
    """
    kind, _, name = address.partition(".")
    if kind in ("param", "let"):
        return _named(compilation, kind, name)
    blocks = compilation.blocks or {}
    block = find_block(blocks, address)
    if block is not None:
        return _block(block)
    words = address.split(".")
    for cut in range(len(words) - 1, 0, -1):
        block, last = find_block(blocks, ".".join(words[:cut])), ".".join(words[cut:])
        if block is not None and last in block.settings:
            definition = schema.definition(block.type)
            attr = definition.attributes.get(last) or definition.free
            return _setting(compilation, block, last, attr) if attr is not None else None
    return None


def describe_type(path: str) -> Json | None:
    """The facts of the table alone about a type or an attribute: `stage.ppo.kl`, `stage.ppo.kl.coef`."""
    if (type_ := schema.find(path)) is not None:
        return type_facts(type_)
    parent, _, name = path.rpartition(".")
    type_ = schema.find(parent)
    if type_ is not None and name in schema.definition(type_).attributes:
        attr = schema.definition(type_).attributes[name]
        required = name in schema.definition(type_).required
        return {"what": "attribute", "address": path} | attribute_facts(attr, required)
    return None


def type_facts(type_: str) -> Json:
    """A type of block: its doc, attributes and inner blocks."""
    definition = schema.definition(type_)
    return {
        "what": "type",
        "address": type_,
        "doc": definition.table["description"],
        "attributes": {
            name: {"type": type_words(attr), "default": default_text(attr, name in definition.required)}
            for name, attr in definition.attributes.items()
        },
        "blocks": {
            name: schema.definition(inner).table["description"] for name, (inner, _) in definition.blocks.items()
        },
    }


def attribute_facts(attr: Attr, required: bool = False) -> Json:
    """An attribute: its doc, type, default, what it affects and becomes, its names elsewhere."""
    affects = {"result": "the result", "speed": "speed and memory only", "none": "neither result nor speed"}
    return {
        "doc": attr.doc,
        "type": type_words(attr),
        "default": default_text(attr, required),
        "example": attr.example,
        "affects": affects[attr.table["x-affects"]],
        "deepspeed": str(attr.table.get("x-deepspeed", "")).split(),
        "elsewhere": {tool: list(names) for tool, names in attr.aliases.items()},
    }


def default_text(attr: Attr, required: bool = False) -> str | None:
    """The default as a recipe would write it; None when it must be written or is derived."""
    if "x-default" in attr.table:
        return '"' + str(attr.table["x-default"]).replace("{name}", "NAME") + '"'
    if "x-default-from" in attr.table:
        return str(attr.table["x-default-from"])
    if required or "default" not in attr.table:
        return None
    value = attr.table["default"]
    text = shown(tuple(value) if isinstance(value, list) else value, attr)
    quoted = isinstance(value, str) and {schema.shape(a) for a in attr.alternatives} == {"text"}
    return f'"{text}"' if quoted else text


def value_text(value: Any, attr: Attr) -> str:
    """A checked value as a recipe would write it; empty for none."""
    match value:
        case Source(text=text):
            return f'"{text}"'
        case Reference():
            return str(value)
        case str() if not any(value in a.get("enum", ()) for a in attr.alternatives):
            return f'"{value}"'
        case _:
            return "" if value is INVALID else shown(value, attr)


def _setting(compilation: Compilation, block: Block, name: str, attr: Attr) -> Json:
    setting = block.settings[name]
    definition = schema.definition(block.type)
    chain = [_origin(origin) for origin in (setting.origin, *setting.earlier)]
    default = default_text(attr, name in definition.required)
    if default is not None and setting.origin.layer != "default":
        chain.append({"layer": "default", "where": "", "text": default})
    return {
        "what": "setting",
        "address": f"{block.address}.{name}",
        "value": value_text(setting.value, attr),
        "chain": chain,
        "reads": _reads(compilation, setting),
    } | attribute_facts(attr, name in definition.required)


def _origin(origin: Origin) -> Json:
    return {"layer": origin.layer, "where": origin.where, "text": origin.text}


def _block(block: Block) -> Json:
    definition = schema.definition(block.type)
    settings = []
    for name, setting in block.settings.items():
        attr = definition.attributes.get(name) or definition.free
        if attr is not None:
            text = value_text(setting.value, attr)
            settings.append({"name": name, "value": text} | _origin(setting.origin))
    return {
        "what": "block",
        "address": block.address,
        "type": block.type,
        "doc": definition.table["description"],
        "settings": settings,
        "blocks": [inner.address for inner in block.blocks.values()],
    }


def _named(compilation: Compilation, kind: str, name: str) -> Json | None:
    values = compilation.values
    entry: Param | Let | None = None
    if values is not None:
        entry = values.params.get(name) if kind == "param" else values.lets.get(name)
    if values is None or entry is None:
        return None
    facts: Json = {"what": kind, "address": f"{kind}.{name}", "value": _value(values, kind, entry)}
    if isinstance(entry, Let):
        chain = [_written(compilation, entry.value)]
        return facts | {"chain": chain, "reads": _names_read(compilation, entry.value)}
    chain = []
    if name in values.given:
        chain.append({"layer": "param", "where": f"-p {name}", "text": _text(compilation, values.given[name].value)})
    default: Param | None = entry
    while default is not None:
        if default.default is not None:
            chain.append(_written(compilation, default.default))
        default = default.earlier
    deciding = values.given[name].value if name in values.given else entry.default
    reads = _names_read(compilation, deciding) if deciding is not None else []
    types = " or ".join(word.text for word in entry.types)
    return facts | {"type": types, "chain": chain, "reads": reads}


def _value(values: Evaluator, kind: str, entry: Param | Let) -> str:
    problems = len(values.problems)
    value = values.named(kind, entry.name.text, entry.name.span)
    del values.problems[problems:]  # its mistakes were told when the recipe was compiled
    return "" if value is None else written(value).strip("`")


def _text(compilation: Compilation, expression: Expression) -> str:
    return compilation.sources[expression.span.file].slice(expression.span)


def _written(compilation: Compilation, expression: Expression) -> Json:
    source = compilation.sources[expression.span.file]
    return {"layer": "file", "where": place(source, expression.span), "text": source.slice(expression.span)}


def _reads(compilation: Compilation, setting: Setting) -> list[Json]:
    """The parameters and `let`s behind a value."""
    if setting.expression is None:
        return []
    return _names_read(compilation, setting.expression)


def _names_read(compilation: Compilation, expression: Expression) -> list[Json]:
    values = compilation.values
    found: list[Json] = []
    todo = list(paths_of(expression))
    seen = set[str]()
    while todo and values is not None:
        path = todo.pop(0)
        behind = values.behind(path)
        if path.text in seen or behind is None:
            continue
        seen.add(path.text)
        kind, key = path.words[0].text, path.words[1].text
        entry = values.params[key] if kind == "param" else values.lets[key]
        where = f"-p {key}" if kind == "param" and key in values.given else _written(compilation, behind)["where"]
        value, text = _value(values, kind, entry), _text(compilation, behind)
        found.append({"name": path.text, "value": value, "where": where, "text": text})
        todo += paths_of(behind)
    return found
