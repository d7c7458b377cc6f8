"""The TextMate grammar for editors, made from the table of the language.

`python -c "from rlhfdsl.lsp import textmate; textmate.write()"` makes it anew in grammar/vscode/syntaxes;
a test fails when it is older than the table.
"""

from __future__ import annotations

import json
from typing import Any

from rlhfdsl.language import schema
from rlhfdsl.language.evaluate import FUNCTIONS, TYPES
from rlhfdsl.language.resources import resource

FILE = "rlhf.tmLanguage.json"
FORMS = ("param", "let", "profile", "override", "extends", "import")
NUMBER = r"\b[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?:[A-Za-z]+\b|%)?"


def words() -> dict[str, list[str]]:
    """The words of the language by what they are: kinds, stages, blocks, attributes, symbols."""
    definitions = [schema.definition(type_) for type_ in schema.types()]
    symbols = {"on", "off", "all"}
    for definition in definitions:
        for attr in definition.attributes.values():
            for alternative in attr.alternatives:
                symbols |= {str(word) for word in alternative.get("enum", ())}
    return {
        "kinds": list(schema.kinds()),
        "stages": list(schema.stage_kinds()),
        "blocks": sorted({name for definition in definitions for name in definition.blocks}),
        "attributes": sorted({name for definition in definitions for name in definition.attributes}),
        "symbols": sorted(symbols),
    }


def grammar() -> dict[str, Any]:
    """The grammar as the JSON that editors read."""
    kinds = {key: "|".join(names) for key, names in words().items()}
    return {
        "$schema": "https://raw.githubusercontent.com/martinring/tmlanguage/master/tmlanguage.json",
        "name": "rlhf",
        "scopeName": "source.rlhf",
        "fileTypes": ["rlhf"],
        "patterns": [
            {"name": "comment.line.number-sign.rlhf", "match": "#.*$"},
            {
                "name": "string.quoted.double.rlhf",
                "begin": '"',
                "end": '"|$',
                "patterns": [{"name": "constant.character.escape.rlhf", "match": r"\\(?:u[0-9a-fA-F]{4}|.)"}],
            },
            {
                "match": rf"^\s*(stage)\s+({kinds['stages']})\b",
                "captures": {"1": {"name": "keyword.other.rlhf"}, "2": {"name": "entity.name.type.rlhf"}},
            },
            {"name": "keyword.other.rlhf", "match": rf"^\s*(?:{kinds['kinds']})\b(?=[^=\n]*\{{)"},
            {"name": "keyword.control.rlhf", "match": rf"^\s*(?:{'|'.join(FORMS)})\b(?!\s*=)"},
            {"name": "keyword.control.rlhf", "match": r"\b(?:from|as)\b(?=\s+[\w\"])"},
            {"name": "variable.other.reference.rlhf", "match": r"\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+"},
            {"name": "variable.other.member.rlhf", "match": rf"\b(?:{kinds['attributes']})\b(?=\s*=)"},
            {"name": "entity.name.tag.rlhf", "match": rf"\b(?:{kinds['blocks']})\b(?=[ \t]*(?:\w+[ \t]*)?\{{)"},
            {"name": "support.type.rlhf", "match": rf"(?<=[:|])\s*(?:{'|'.join(TYPES)})\b"},
            {"name": "support.function.rlhf", "match": rf"\b(?:{'|'.join(FUNCTIONS)})\b(?=\s*\()"},
            {"name": "constant.numeric.rlhf", "match": NUMBER},
            {"name": "constant.language.rlhf", "match": rf"(?<==)\s*(?:{kinds['symbols']})\b"},
            {"name": "keyword.operator.rlhf", "match": r"[=+\-*/|:]"},
        ],
    }


def generate() -> str:
    """The text of the file."""
    return json.dumps(grammar(), indent=2) + "\n"


def write() -> None:
    """Write the file anew."""
    (resource("grammar", "vscode") / "syntaxes" / FILE).write_text(generate(), encoding="utf-8")
