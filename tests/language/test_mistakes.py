"""The bad corpus, files that cannot be read, and what a mutation of a good recipe gives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpus import BAD, CORPUS, expected

from rlhfdsl.language import Compilation, Diagnostic, as_json, load, render
from rlhfdsl.language.diagnostics.codes import CODES

SAMPLE = (CORPUS / "ok" / "three-stages.rlhf").read_text(encoding="utf-8")
# Codes that a file cannot show by a comment of its own, with the test that shows them.
ELSEWHERE = {
    "E0208": "test_a_file_without_a_recipe",
    "E0508": "test_layers.test_a_profile_is_stronger_than_the_files_and_weaker_than_set",
    "E0904": "test_layers.test_limits_of_includes",
    "E0503": "test_recipes.test_arguments_that_are_wrong",
    "E0892": "test_files",
    "E0893": "test_files",
    "E0894": "test_files",
    "E0895": "test_a_file_of_another_kind_is_told_once",
    "E0901": "test_files",
}


def found(compilation: Compilation) -> list[tuple[int, str]]:
    def line(diagnostic: Diagnostic) -> int:
        span = diagnostic.span
        return compilation.sources[span.file].position(span.start)[0] if span is not None else 0

    return sorted((line(diagnostic), diagnostic.code) for diagnostic in compilation.diagnostics)


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_a_bad_recipe_gives_what_its_comments_say(path):
    compilation = load(path)
    assert found(compilation) == expected(path)
    assert path.stem[:5] in [code for _, code in expected(path)]
    assert (compilation.recipe is None) == any(code.startswith("E") for _, code in expected(path))


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_messages_have_one_shape(path):
    for diagnostic in load(path).diagnostics:
        for text in (diagnostic.message, diagnostic.help or "", *diagnostic.notes):
            assert not text.endswith((".", "!")) or text.endswith("…"), text
            assert "\n" not in text and "  " not in text
        assert diagnostic.severity == {"E": "error", "W": "warning"}[diagnostic.code[0]]


def test_every_code_has_a_fixture():
    shown = {code for path in BAD for _, code in expected(path)}
    assert shown | ELSEWHERE.keys() == CODES.keys()
    assert not shown & ELSEWHERE.keys()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "E0891"),
        (b"", "E0894"),
        (b" \n\t\n", "E0894"),
        (b"\xff\xfe", "E0893"),
        ('recipe "café" { }\n'.encode("latin-1"), "E0893"),
        (b"#" * (1 << 20) + b"\n", "E0901"),
        (b"recipe \0", "E0110"),
        (b'recipe "x" {\r}\r', "E0110"),
    ],
    ids=["missing", "empty", "blank", "utf-16", "latin-1", "large", "nul", "lone-cr"],
)
def test_files(tmp_path: Path, content: bytes | None, code: str):
    path = tmp_path / "x.rlhf"
    if content is not None:
        path.write_bytes(content)
    compilation = load(path)
    assert compilation.recipe is None and {d.code for d in compilation.diagnostics} == {code}
    assert render(compilation.diagnostics, compilation.sources, colour=False)


@pytest.mark.parametrize(
    ("name", "content", "what", "help"),
    [
        ("pairs.jsonl", b'{"prompt": "a", "chosen": "b"}\n' * 40, "JSON lines", 'from = "./pairs.jsonl"'),
        ("large.jsonl", b'{"prompt": "a", "chosen": "b"}\n' * 40_000, "JSON lines", 'from = "./large.jsonl"'),
        ("plan.json", b'{\n "format_version": "1.0",\n "stages": []}', "a saved plan", "`rlhf run plan.json`"),
        ("rows.json", b'[{"prompt": "a"},\n {"prompt": "b"}]', "JSON", "`rlhf init`"),
        ("sft.yaml", b"# of TRL\nmodel_name_or_path: x\nlist:\n  - a: {b: 1}\nlr: 1\n", "YAML", "`rlhf import"),
        ("model.safetensors", b"H\x02\0\0\0\0\0\0{}" + bytes(range(256)), "a binary file", ".rlhf"),
    ],
)
def test_a_file_of_another_kind_is_told_once(tmp_path, monkeypatch, name, content, what, help):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    (only,) = load(name).diagnostics
    assert only.code == "E0895" and only.message.startswith(f"`{name}` is not a recipe: it looks like {what}")
    assert help in only.help


@pytest.mark.parametrize(
    "text", ["{ recipe x }", "seed: 1\n", 'recipe "x" {\n  seed: 1\n  output: 2\n}\n', '[1]\nrecipe "x" { }\n']
)
def test_a_broken_recipe_is_not_taken_for_another_kind(tmp_path, text):
    (tmp_path / "x.rlhf").write_text(text)
    assert "E0895" not in {d.code for d in load(tmp_path / "x.rlhf").diagnostics}


def test_a_folder_is_no_recipe(tmp_path: Path):
    assert [d.code for d in load(tmp_path).diagnostics] == ["E0892"]
    assert [d.code for d in load(tmp_path / ("x" * 5000)).diagnostics] == ["E0891"]
    assert [d.code for d in load("a\0b").diagnostics] == ["E0891"]


def test_a_file_without_a_recipe(tmp_path: Path):
    path = tmp_path / "x.rlhf"
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert [d.code for d in load(path).diagnostics] == ["E0208"]


def test_an_override_of_the_recipe_block_is_one_mistake(tmp_path: Path):
    """What it says belongs in a block of the file's own, so that there is none is not told as well."""
    (tmp_path / "base.rlhf").write_text(
        'recipe "base" { }\nmodel tiny { arch = gpt2, layers = 1, hidden = 8, heads = 2, tokenizer = bytes }\n'
        'data rows { from = "./rows.jsonl", format = chat }\n'
        "stage sft { model = model.tiny, data = data.rows, batch = 1, length = 8, lr = 1e-3 }\n",
        encoding="utf-8",
    )
    path = tmp_path / "x.rlhf"
    path.write_text('extends "base.rlhf"\noverride recipe { seed = 1 }\n', encoding="utf-8")
    (only,) = load(path).diagnostics
    assert only.code == "E0213" and only.help == 'write `recipe "my-run" { … }` in its place'


@pytest.mark.parametrize(("wrong", "right"), [("params", "param"), ("profiles", "profile"), ("overide", "override")])
def test_a_statement_that_is_written_as_a_block_is_shown(tmp_path: Path, wrong: str, right: str):
    path = tmp_path / "x.rlhf"
    path.write_text(f'recipe "t" {{ }}\n{wrong} {{ size = 4 }}\n', encoding="utf-8")
    found = next(d for d in load(path).diagnostics if d.code == "E0206")
    assert found.help.startswith(f"did you mean `{right}`? It is written `{right} ")


@pytest.mark.parametrize("change", [lambda s: "\ufeff" + s, lambda s: s.replace("\n", "\r\n"), str.rstrip])
def test_bom_crlf_and_a_missing_last_newline_are_fine(tmp_path: Path, change):
    path = tmp_path / "x.rlhf"
    path.write_bytes(change(SAMPLE).encode())
    assert load(path).diagnostics == ()


def test_long_chains_of_parameters_end(tmp_path: Path):
    chain = ["param p0: int = 1\n", *(f"param p{n}: int = param.p{n - 1} * 2\n" for n in range(1, 2000))]
    path = tmp_path / "x.rlhf"
    path.write_text(SAMPLE + "".join(reversed(chain)), encoding="utf-8")
    assert {d.code for d in load(path).diagnostics} == {"E0902"}


def mutations(text: str) -> Iterator[tuple[str, str]]:
    """Each token deleted, doubled, and swapped with the next one."""
    tokens = re.findall(r'"[^"\n]*"|#[^\n]*|[A-Za-z_]\w*|[0-9][\w.%-]*|[ \t]+|\n|.', text)
    places = [i for i, t in enumerate(tokens) if t == "\n" or (t.strip() and not t.startswith("#"))]
    for i in places:
        yield f"without {tokens[i]!r} ({i})", "".join(tokens[:i] + tokens[i + 1 :])
        yield f"{tokens[i]!r} twice ({i})", "".join([*tokens[: i + 1], " ", *tokens[i:]])
    for a, b in zip(places, places[1:], strict=False):
        swapped = list(tokens)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        yield f"{tokens[a]!r} and {tokens[b]!r} swapped ({a})", "".join(swapped)


def count_errors(path: Path, step: int) -> Counter[int]:
    """How many mutations give how many errors; each must render, with spans inside its text."""
    counts: Counter[int] = Counter()
    for number, (what, text) in enumerate(mutations(SAMPLE)):
        if number % step:
            continue
        path.write_text(text, encoding="utf-8")
        compilation = load(path)
        errors = [d for d in compilation.diagnostics if d.severity == "error"]
        assert bool(errors) == (compilation.recipe is None), what
        spans = [diagnostic.span for diagnostic in compilation.diagnostics if diagnostic.span is not None]
        assert all(0 <= span.start <= span.end <= len(text) for span in spans), what
        render(compilation.diagnostics, compilation.sources, colour=True)
        as_json(compilation.diagnostics, compilation.sources)
        counts[len(errors)] += 1
    return counts


def few(counts: Counter[int]) -> float:
    return sum(n for errors, n in counts.items() if errors <= 3) / counts.total()


def test_one_mutation_gives_few_errors(tmp_path: Path):
    assert few(count_errors(tmp_path / "x.rlhf", step=7)) >= 0.99


@pytest.mark.slow
def test_every_mutation_gives_few_errors(tmp_path: Path):
    assert few(count_errors(tmp_path / "x.rlhf", step=1)) >= 0.99


TEN = """\
recipe "ten" { languge = 1 }                                    # E0301
model tiny { arch: gpt2, layers = 1, hidden = 8, heads = 3 }    # E0106 E0316
data rows { from = "rows.jsonl", format = chat }                # E0317
stage sft {
  model    = model.tyni                                         # E0201
  data     = data.rows
  batch    =                                                    # E0102
  length   = 16K                                                # E0308
  lr       = "fast"                                             # E0306
  epochs   = 0                                                  # E0307
  schedule = cosinus                                            # E0304
}
"""


def test_ten_mistakes_are_ten_errors(tmp_path: Path):
    """Of syntax and of meaning, in one run: none hides another, and none is told twice."""
    path = tmp_path / "ten.rlhf"
    path.write_text(TEN, encoding="utf-8")
    lines = enumerate(TEN.split("\n"), 1)
    assert found(load(path)) == [(n, code) for n, line in lines for code in re.findall(r"E\d{4}", line)]


@pytest.mark.parametrize(
    ("value", "help"),
    [("“a/b”", 'write "…", with straight quotes'), ("é", "any letter may stand in a text, in quotes")],
)
def test_a_strange_character_has_a_way_out(tmp_path, value, help):
    path = tmp_path / "own.rlhf"
    path.write_text(f'recipe "own" {{ }}\nmodel base {{ from = {value} }}\n', encoding="utf-8")
    first = load(path).diagnostics[0]
    assert first.code == "E0110" and help in first.help
