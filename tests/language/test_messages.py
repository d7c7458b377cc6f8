"""Diagnostics as a reader sees them: windows, colour, JSON, fixes; and UserError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpus import CORPUS

from rlhfdsl.language import Diagnostic, Label, Span, UserError, as_json, load, render
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.suggest import distance, either, nearest

TEXT = 'model a {\n  lr = 1\n\tx = "日本" 2\n}\n'
SOURCES = {"t": SourceFile("t", TEXT)}


def at(piece: str) -> Span:
    start = TEXT.index(piece)
    return Span("t", start, start + len(piece))


def test_a_window_shows_both_places():
    labels = (Label(at("model a"), "in this"),)
    diagnostic = Diagnostic(
        "E0301", "error", "no such thing", at("lr"), "here", labels, ("a note",), "a help"
    )
    assert render([diagnostic], SOURCES, colour=False) == (
        "error[E0301]: no such thing\n"
        " --> t:2:3\n"
        "  |\n"
        "1 | model a {\n"
        "  | ------- in this\n"
        "2 |   lr = 1\n"
        "  |   ^^ here\n"
        "  |\n"
        "  = note: a note\n"
        "  = help: a help"
    )


def test_marks_stand_under_wide_characters_and_tabs():
    text = render([Diagnostic("E0101", "error", "m", at('"日本"'))], SOURCES, colour=False)
    assert text.split("\n")[3:] == ['3 |     x = "日本" 2', "  |         ^^^^^^"]


def test_no_place_and_many():
    one = Diagnostic("E0891", "error", "no file", help="look")
    assert render([one], {}, colour=False) == "error[E0891]: no file\n  = help: look"
    assert render([one] * 60, {}, colour=False).endswith("… and 10 more")
    assert render([], {}, colour=False) == ""


def test_colour_adds_nothing_but_colour():
    import re

    diagnostic = Diagnostic("W0201", "warning", "m", at("lr"), "here", (Label(at("x"), "there"),))
    coloured = render([diagnostic], SOURCES, colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == render([diagnostic], SOURCES, colour=False)


def test_a_long_line_is_cropped():
    text = "k n { " + "a = 1, " * 500 + "b = $ }\n"
    start = text.index("$")
    window = render(
        [Diagnostic("E0110", "error", "m", Span("t", start, start + 1))], {"t": SourceFile("t", text)}, False
    )
    code, mark = window.split("\n")[3:]
    assert len(code) < 120 and code[mark.index("^")] == "$"


def test_json_has_lines_and_offsets():
    path = CORPUS / "bad" / "E0304-word.rlhf"
    compilation = load(path)
    data = json.loads(json.dumps(as_json(compilation.diagnostics, compilation.sources)))
    assert data["format_version"] == "1.0"
    first = data["diagnostics"][0]
    text = path.read_text(encoding="utf-8")
    start = text.index("bf15")
    assert (first["code"], first["severity"]) == ("E0304", "error")
    assert first["span"]["start"] == {"line": 2, "column": 72, "offset": start}
    assert first["span"]["end"]["offset"] == start + 4
    assert first["fixes"] == [
        {"title": "write `bf16`", "edits": [{"span": first["span"], "text": "bf16"}]},
    ]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("learning_rate", "`lr` here"),
        ("num_train_epochs", "`epochs` here"),
        ("epoks", "`epochs`"),
        ("wramup", "`warmup`"),
        ("init_kl_coef", "`coef` in the block `kl` of a `stage ppo`"),
        ("zero_stage", "`zero` in a `parallel` block"),
        ("per_device_train_batch_size", "`micro` in a `parallel` block"),
        ("gpus", "in a `cluster` block"),
        ("top_p", "`top_p` stands in the block `rollout`"),
        ("whiten_rewards", "whitens the advantages"),
        ("log", "`every { log = … }`"),
        ("remote_code", "never run"),
    ],
)
def test_suggestions(tmp_path: Path, wrong: str, right: str):
    path = tmp_path / "t.rlhf"
    text = (CORPUS / "ok" / "smallest.rlhf").read_text(encoding="utf-8")
    path.write_text(text.replace("lr = 1e-3", f"lr = 1e-3, {wrong} = 1"), encoding="utf-8")
    (diagnostic,) = load(path).diagnostics
    assert diagnostic.code == "E0301" and right in (diagnostic.help or "")


def test_a_block_has_its_article(tmp_path: Path):
    path = tmp_path / "t.rlhf"
    text = (CORPUS / "ok" / "smallest.rlhf").read_text(encoding="utf-8")
    path.write_text(text.replace("lr = 1e-3", "lr = 1e-3, every { lock = 1 }, lora { rnak = 1 }"), encoding="utf-8")
    messages = [diagnostic.message for diagnostic in load(path).diagnostics]
    assert "unknown attribute `lock` in an `every` block" in messages
    assert "unknown attribute `rnak` in a `lora` block" in messages


@pytest.mark.parametrize(
    ("inside", "right"),
    [
        ("overlap_com = on", "`overlap_comm`? A recipe does not pass it on: it follows from `zero`"),
        ("zero_optimization { overlap_com = on }", "`overlap_comm`? A recipe does not pass it on"),
        ("curriculum_learing { }", "`curriculum_learning`? A recipe does not pass it on: what a stage reads is `data`"),
        ("steps_per_prin = 4", "`steps_per_print`?"),
    ],
)
def test_suggestions_of_keys_that_the_plan_derives(tmp_path: Path, inside: str, right: str):
    path = tmp_path / "t.rlhf"
    text = (CORPUS / "ok" / "smallest.rlhf").read_text(encoding="utf-8")
    path.write_text(text.replace("lr = 1e-3", f"lr = 1e-3, deepspeed {{ {inside} }}"), encoding="utf-8")
    (diagnostic,) = load(path).diagnostics
    assert diagnostic.code == "E0301" and (diagnostic.help or "").startswith(f"did you mean {right}")


def test_one_wrong_name_is_one_error(tmp_path: Path):
    """A required attribute under another tool's name is not missed as well."""
    path = tmp_path / "t.rlhf"
    text = (CORPUS / "ok" / "smallest.rlhf").read_text(encoding="utf-8")
    wrong = text.replace("lr =", "learning_rate =").replace("model.tiny", "model.tyni")
    path.write_text(wrong, encoding="utf-8")
    compilation = load(path)
    assert [d.code for d in compilation.diagnostics] == ["E0201", "E0301"]
    fixed = wrong
    for diagnostic in sorted(compilation.diagnostics, key=lambda d: -d.span.start):
        (edit,) = diagnostic.fixes[0].edits
        fixed = fixed[: edit.span.start] + edit.text + fixed[edit.span.end :]
    assert fixed == text


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [("", "abc", 3), ("abc", "abc", 0), ("abc", "acb", 1), ("lr", "rl", 1), ("kitten", "sitting", 3)],
)
def test_distance(a, b, steps):
    assert distance(a, b) == distance(b, a) == steps


def test_nearest_and_lists():
    assert nearest("epoks", ["epochs", "eps", "every"]) == ["epochs", "eps"]
    assert nearest("xy", ["batch", "length"]) == []
    assert (either(["a"]), either(["a", "b", "c"])) == ("a", "a, b or c")


def test_a_user_error_shows_its_setting():
    recipe = load(CORPUS / "ok" / "three-stages.rlhf").recipe
    assert recipe is not None
    place = "data/own.jsonl:17"
    error = UserError("E0801", "row 17 has no answer", at="data.own.from", place=place, help="add it")
    text = render([error.diagnostic(recipe)], recipe.sources, colour=False)
    assert '20 | data own { from = "./data/own.jsonl", format = preference }' in text
    assert "^^^^^^^^^^^^^^^^^^" in text and "note: in data/own.jsonl:17" in text
    alone = error.diagnostic(None)
    assert alone.span is None and alone.notes == ("at data.own.from", "in data/own.jsonl:17")
    assert str(error) == "[E0801] row 17 has no answer (data/own.jsonl:17)"
