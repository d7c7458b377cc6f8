"""The table of the language against JSON Schema, against the checker, and against the corpus."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from corpus import CORPUS, OK

from rlhfdsl.language import Block, Recipe, Reference, Source, load, schema
from rlhfdsl.language.describe import Symbol
from rlhfdsl.language.evaluate import Evaluator
from rlhfdsl.language.parser import parse_assignment
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.units import Quantity, read_number
from rlhfdsl.language.values import INVALID, fit, in_range

TABLE = schema.table()
TOOLS = (
    *("DeepSpeed", "DeepSpeed-Chat", "TRL", "OpenRLHF", "verl", "axolotl", "LLaMA-Factory"),
    *("transformers", "accelerate", "peft"),
)
VALIDATOR = jsonschema.Draft202012Validator(TABLE)


def attributes() -> Iterator[tuple[str, schema.Attr]]:
    for type_ in schema.types():
        for attr in schema.definition(type_).attributes.values():
            yield type_, attr


def as_instance(recipe: Recipe) -> dict[str, Any]:
    """A recipe as the JSON that the schema describes: only what is written."""
    instance: dict[str, Any] = {}
    for block in recipe.blocks.values():
        if block.kind == "recipe":
            instance["recipe"] = block_instance(block)
        else:
            instance.setdefault(block.kind, {})[block.name] = block_instance(block)
    return instance


def block_instance(block: Block) -> dict[str, Any]:
    values = {name: plain(setting.value) for name, setting in block.settings.items() if block.written(name)}
    inner = {name: block_instance(inner) for name, inner in block.blocks.items()}
    return values | {name: value for name, value in inner.items() if value and not name.startswith("mix.")}


def plain(value: Any) -> Any:
    match value:
        case Reference():
            return str(value)
        case Source():
            return value.text
        case tuple():
            return [plain(item) for item in value]
        case _:
            return value


def test_it_is_a_json_schema():
    jsonschema.Draft202012Validator.check_schema(TABLE)


@pytest.mark.parametrize("path", OK, ids=lambda path: path.stem)
def test_jsonschema_agrees_on_good_recipes(path: Path):
    recipe = load(path).recipe
    assert recipe is not None
    VALIDATOR.validate(as_instance(recipe))


@pytest.mark.parametrize(
    "path",
    [
        "E0301-attribute", "E0304-word", "E0305-missing", "E0307-range", "E0310-exclude", "E0204-edges",
    ],
)  # fmt: skip
def test_jsonschema_refuses_what_the_checker_refuses(path: str):
    """On the table's own ground: one value of a good recipe is broken as the fixture breaks it."""
    recipe = load(CORPUS / "ok" / "everything.rlhf").recipe
    assert recipe is not None
    instance = as_instance(recipe)
    broken = copy.deepcopy(instance)
    sft = broken["stage"]["sft"]
    match path:
        case "E0301-attribute":
            sft["learning_rate"] = 1e-3
        case "E0304-word":
            broken["model"]["base"]["dtype"] = "bf15"
        case "E0305-missing":
            del broken["stage"]["long"]["rollout"]["prompt"]
        case "E0307-range":
            sft["batch"] = 0
        case "E0310-exclude":
            sft["epochs"] = 1
        case "E0204-edges":
            sft["model"] = 3
    assert VALIDATOR.is_valid(instance) and not VALIDATOR.is_valid(broken)


def test_every_attribute_is_described():
    for type_, attr in attributes():
        where = f"{type_}.{attr.name}"
        assert attr.doc and not attr.doc.endswith("."), where
        assert attr.table["x-affects"] in ("result", "speed", "none"), where
        assert attr.table.get("examples"), where
        assert all(tool in TOOLS and names for tool, names in attr.aliases.items()), where
    for type_ in schema.types():
        assert TABLE["$defs"][type_]["description"].endswith(".")


@pytest.mark.parametrize(("type_", "attr"), attributes(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_examples_and_defaults_are_right_values(type_: str, attr: schema.Attr):
    only = {key: value for key, value in attr.table.items() if not key.startswith("x-")}
    if "default" in attr.table:
        jsonschema.Draft202012Validator(only).validate(attr.table["default"])
    assignment, problems = parse_assignment(SourceFile("t", attr.example))
    assert assignment is not None and problems == []
    value = Evaluator({}, {}, problems, True).value(assignment.value)
    assert value is not None and problems == []
    fits = [(a, fit(a, value)) for a in attr.alternatives]
    assert any(found is not INVALID and in_range(a, found) for a, found in fits)


def probes(alternative: dict[str, Any]) -> list[float]:
    keys = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    bounds = [alternative[key] for key in keys if key in alternative]
    return [0.5, *(probe for bound in (0, *bounds) for probe in (bound - 1, bound, bound + 1, bound + 0.5))]


@pytest.mark.parametrize(("type_", "attr"), attributes(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_the_checker_and_jsonschema_draw_the_same_ranges(type_: str, attr: schema.Attr):
    for alternative in attr.alternatives:
        if schema.shape(alternative) not in ("count", "number", "ratio"):
            continue
        validator = jsonschema.Draft202012Validator(alternative)
        for probe in probes(dict(alternative)):
            quantity = read_number(f"{abs(probe):.10f}")
            assert isinstance(quantity, Quantity)
            value = Quantity(quantity.value if probe >= 0 else -quantity.value)
            fitted = fit(alternative, value)
            accepted = fitted is not INVALID and in_range(alternative, fitted)
            assert accepted == validator.is_valid(probe), (alternative, probe)


def test_words_mean_what_the_table_says():
    for _, attr in attributes():
        for alternative in attr.alternatives:
            if schema.shape(alternative) == "symbol":
                assert all(fit(alternative, Symbol(word)) == word for word in alternative["enum"])
                assert fit(alternative, Symbol("nonsense")) is INVALID


def test_the_good_corpus_writes_every_attribute():
    written = set()

    def visit(block: Block) -> None:
        written.update((block.type, name) for name in block.settings if block.written(name))
        for inner in block.blocks.values():
            visit(inner)

    for path in OK:
        recipe = load(path).recipe
        assert recipe is not None
        for block in recipe.blocks.values():
            visit(block)
    left = {(type_, attr.name) for type_, attr in attributes()} - written
    # What a group of attributes gives to several types is written in one of them.
    groups = [data["properties"] for data in TABLE["$defs"].values() if "title" not in data]
    grouped = {name for group in groups for name in group} & {name for _, name in written}
    left = {pair for pair in left if pair[1] not in grouped and not pair[0].startswith("deepspeed")}
    assert left == set()


def test_aliases_lead_somewhere():
    for type_, attr in attributes():
        for names in attr.aliases.values():
            for name in names:
                assert any(found[:2] == (type_, attr.name) for found in schema.from_alias(type_, name))
