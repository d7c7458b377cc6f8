"""The reference of the language, docs/language/reference.md, made from its table.

`python -c "from rlhfdsl.language import reference; reference.write()"` makes it anew; a test fails when it is
older than the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhfdsl.language import schema
from rlhfdsl.language.explain import attribute_facts
from rlhfdsl.language.values import type_words

FILE = Path(__file__).parents[2] / "docs" / "language" / "reference.md"

_AFFECTS = {"the result": "result", "speed and memory only": "speed", "neither result nor speed": "none"}


def generate() -> str:
    """The text of the file: a section for each type of block, a row for each attribute."""
    lines = [
        "# Reference",
        "",
        "Generated from grammar/recipe.schema.json. `rlhf explain stage.ppo.kl.coef` tells the same of one entry, and",
        "`rlhf explain FILE stage.ppo.kl.coef` of one value of a recipe.",
        "",
        "Affects: `result`, another value gives another model; `speed`, only time and memory differ; `none`, neither.",
    ]
    for type_ in schema.types():
        lines += ["", *_section(type_)]
    return "\n".join(lines) + "\n"


def _section(type_: str) -> Iterator[str]:
    definition = schema.definition(type_)
    yield f"{'##' if type_.count('.') < 2 and '.' not in type_.removeprefix('stage.') else '###'} `{type_}`"
    yield ""
    yield str(definition.table["description"])
    if definition.free is not None:
        yield ""
        facts = attribute_facts(definition.free)
        yield f"Each name is the writer's; its value is {type_words(definition.free)}: {facts['doc']}."
    if definition.attributes:
        yield ""
        yield "| attribute | takes | default | affects | what it is | example |"
        yield "|---|---|---|---|---|---|"
    for name, attr in definition.attributes.items():
        facts = attribute_facts(attr, name in definition.required)
        needed = name in definition.required
        default = "required" if needed else f"`{facts['default']}`" if facts["default"] else "none"
        example = str(attr.table["examples"][0])
        cells = [f"`{name}`", facts["type"], default, _AFFECTS[facts["affects"]], facts["doc"], f"`{example}`"]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    for group in definition.exclusive:
        yield ""
        yield f"At most one of {', '.join(f'`{name}`' for name in group)}."
    if definition.blocks:
        yield ""
        yield "Inner blocks:"
        yield ""
    for name, (inner, present) in definition.blocks.items():
        written = name in definition.required or (present and bool(schema.definition(inner).required))
        must = " (required)" if written else " (there with its defaults)" if present else ""
        yield f"- `{name}`{must}: {schema.definition(inner).table['description']} See `{inner}`."


def write() -> None:
    """Write the file anew."""
    FILE.write_text(generate(), encoding="utf-8")
