"""Texts that nobody would write: by the grammar, by bytes, and good recipes with pieces moved about.

None may end in an exception, a span outside its text, or a formatter that changes what a text says.
"""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
from corpus import CORPUS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.lark import from_lark
from lark import Lark

from rlhfdsl.language import as_json, load, render
from rlhfdsl.language.format import format_text
from rlhfdsl.language.resources import resource
from rlhfdsl.language.source import SourceFile
from rlhfdsl.lsp.complete import complete

GOOD = [path.read_text(encoding="utf-8") for path in sorted((CORPUS / "ok").glob("*.rlhf"))]
PIECES = re.findall(r'"[^"\n]*"|#[^\n]*|\w[\w.%]*|\s|.', "".join(GOOD))
PLAIN = ("model", "sft", "stage", "lr", "kl", "mix", "x", "data", "param", "let")
ODD = ["\x00", "\r", "\u202e", "é", "🐢", '"', "\\", "\\u12", "$", "'", "{{", "}}", "[[", "1e", "9" * 50, "((((", "//"]


def whole_grammar() -> Lark:
    """The grammar without comments, which would swallow the rest of a line, and without the recovery."""
    text = resource("grammar", "rlhf.lark").read_text(encoding="utf-8")
    text = re.sub(r"\s*\|\s*_ERROR", "", text).replace("%declare _ERROR", "")
    text = re.sub(r"^COMMENT:.*$|^%ignore COMMENT$", "", text, flags=re.MULTILINE)
    return Lark(text.replace("(?:#[^\\n]*)?", ""), parser="lalr", start="start")


def recipes() -> st.SearchStrategy[str]:
    names = st.sampled_from([f" {word} " for word in PLAIN])
    words = ("let", "as", "param", "extends", "override", "profile", "from")
    return from_lark(
        whole_grammar(),
        start="start",
        explicit={
            "NAME": names,
            "STRING": st.sampled_from(['"a/b"', '"./x"', '""', '"base.rlhf"']),
            "NUMBER": st.sampled_from(["1", "1e-5", "0.1", "16k", "2GiB", "30m", "80%"]),
            "_NL": st.just("\n"),
            **{word.upper(): st.just(f" {word} ") for word in words},
            "IMPORT": st.just(" import "),
        },
    )  # fmt: skip


def survives(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    compilation = load(path)
    assert (compilation.recipe is None) == any(d.severity == "error" for d in compilation.diagnostics)
    for diagnostic in compilation.diagnostics:
        spans = [diagnostic.span, *(label.span for label in diagnostic.secondary)]
        for span in (span for span in spans if span is not None and span.file in compilation.sources):
            assert 0 <= span.start <= span.end <= len(compilation.sources[span.file].text)
    render(compilation.diagnostics, compilation.sources, colour=True)
    as_json(compilation.diagnostics, compilation.sources)
    source = compilation.sources.get(path.as_posix())
    if source is not None:
        format_text(SourceFile("t", source.text))  # it checks itself, and raises
        complete(source.text, len(source.text) // 2, compilation)


@given(recipes())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_by_the_grammar(tmp_path_factory, text):
    survives(tmp_path_factory.mktemp("f") / "x.rlhf", text.encode())


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_by_bytes(tmp_path_factory, data):
    survives(tmp_path_factory.mktemp("f") / "x.rlhf", data)


def moved(rng: random.Random) -> str:
    """A good recipe in which pieces are gone, doubled, swapped or put in."""
    tokens = re.findall(r'"[^"\n]*"|#[^\n]*|\w[\w.%]*|\s|.', rng.choice(GOOD))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(tokens))
        size = rng.randint(1, 40)
        match rng.randrange(4):
            case 0:
                del tokens[at : at + rng.choice([1, size])]
            case 1:
                tokens.insert(at, rng.choice(PIECES))
            case 2:
                tokens.insert(at, rng.choice(ODD))
            case 3:
                tokens.insert(at, "".join(tokens[at : at + size]))
        tokens = tokens or ["x"]
    return "".join(tokens)


def test_by_moving_pieces(tmp_path):
    rng = random.Random(7)
    for _ in range(150):
        survives(tmp_path / "x.rlhf", moved(rng).encode())


@pytest.mark.slow
def test_by_moving_pieces_for_a_minute(tmp_path):
    rng = random.Random()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        survives(tmp_path / "x.rlhf", moved(rng).encode())
