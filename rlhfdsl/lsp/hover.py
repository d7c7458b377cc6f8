"""What is told about the thing under a cursor, and the numbers shown beside calculations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhfdsl.language import schema
from rlhfdsl.language.compile import Compilation
from rlhfdsl.language.diagnostics import Span
from rlhfdsl.language.explain import attribute_facts, explain, value_text
from rlhfdsl.language.recipe import Block, Setting
from rlhfdsl.language.syntax import Call, Number, Operation, Path, Word
from rlhfdsl.lsp.context import context_at, type_of
from rlhfdsl.lsp.names import Name


def settings(block: Block) -> Iterator[tuple[Block, str, Setting]]:
    """Every written setting of a block and of those inside it."""
    for name, setting in block.settings.items():
        if setting.span is not None:
            yield block, name, setting
    for inner in block.blocks.values():
        yield from settings(inner)


def hover(text: str, offset: int, file: str, compilation: Compilation, name: Name | None) -> tuple[str, Span] | None:
    """Markdown about what a cursor stands on, and its span; `name` is the name there, if any."""
    for top in (compilation.blocks or {}).values():
        for block, key, setting in settings(top):
            if setting.name is not None and setting.name.file == file and _holds(setting.name, offset):
                facts = explain(compilation, f"{block.address}.{key}")
                return (_setting(key, facts), setting.name) if facts is not None else None
    if name is not None:
        facts = explain(compilation, name.address)
        return (_named(facts), name.span) if facts is not None else None
    return _word(text, offset, file)


def _holds(span: Span, offset: int) -> bool:
    return span.start <= offset <= span.end


def _word(text: str, offset: int, file: str) -> tuple[str, Span] | None:
    """A kind of block, an inner block or an attribute, by the table alone."""
    start, end = offset, offset
    while start and (text[start - 1].isalnum() or text[start - 1] == "_"):
        start -= 1
    while end < len(text) and (text[end].isalnum() or text[end] == "_"):
        end += 1
    word, context = text[start:end], context_at(text, start)
    if not word or context.where not in ("top", "name", "label"):
        return None
    span = Span(file, start, end)
    inner = type_of((*context.blocks, (word,))) if context.blocks else None
    type_ = inner or (f"stage.{word}" if context.statement[:1] == ("stage",) else word if not context.blocks else "")
    if type_ in schema.types():
        definition = schema.definition(type_)
        return f"**{definition.name}** · {definition.table['description']}", span
    if context.type is not None and word in schema.definition(context.type).attributes:
        attr = schema.definition(context.type).attributes[word]
        return _setting(word, attribute_facts(attr)), span
    return None


def _setting(name: str, facts: dict[str, Any]) -> str:
    value = f" = `{facts['value']}`" if facts.get("value") else ""
    lines = [f"**{name}**{value}", "", facts["doc"], "", f"- takes {facts['type']}"]
    if facts["default"]:
        lines.append(f"- default `{facts['default']}`")
    lines.append(f"- affects {facts['affects']}")
    lines += [f"- becomes `{key}` of DeepSpeed's configuration" for key in facts["deepspeed"]]
    chain = facts.get("chain", [])
    if len(chain) > 1 and chain[1]["layer"] != "default":
        lines += ["", "| | |", "|-|-|"]
        lines += [f"| {link['layer']} {link['where']} | `{link['text'].replace('|', ' ')}` |" for link in chain]
    for read in facts.get("reads", ()):
        lines.append(f"- reads `{read['name']}` = `{read['value']}`")
    return "\n".join(lines)


def _named(facts: dict[str, Any]) -> str:
    if facts["what"] == "block":
        title = f"**{facts['address']}** · {facts['doc']}"
        rows = [f"{s['name']} = {s['value']}" for s in facts["settings"] if s["layer"] != "default"]
        return "\n".join([title, "", "```rlhf", *rows, "```"])
    lines = [f"**{facts['address']}** = `{facts['value']}`"]
    lines += [f"- {link['where']}: `{link['text']}`" for link in facts["chain"]]
    return "\n".join([lines[0], "", *lines[1:]])


def hints(file: str, compilation: Compilation) -> list[tuple[int, str]]:
    """Offsets behind calculations and names of values, with what they come to: ` = 128`."""
    found: dict[int, str] = {}
    for top in (compilation.blocks or {}).values():
        for block, key, setting in settings(top):
            expression = setting.expression
            if expression is None or setting.span is None or setting.span.file != file:
                continue
            named = isinstance(expression, Path) and expression.words[0].text in ("param", "let")
            binary = isinstance(expression, Number) and expression.text.endswith("i")
            definition = schema.definition(block.type)
            attr = definition.attributes.get(key) or definition.free
            if attr is not None and (named or binary or isinstance(expression, Operation | Call)):
                value = value_text(setting.value, attr)
                if value and not isinstance(expression, Word):
                    found.setdefault(setting.span.end, f" = {value}")
    return sorted(found.items())
