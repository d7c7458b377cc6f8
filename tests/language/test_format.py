"""The formatter: what the one form is, and that it loses nothing and is stable."""

from __future__ import annotations

import random
import re

import pytest
from corpus import BAD, CORPUS, OK

from rlhfdsl.language.format import bare, format_text, layout
from rlhfdsl.language.parser import parse
from rlhfdsl.language.resources import resource
from rlhfdsl.language.source import SourceFile

RECIPES = sorted(resource("recipes").glob("*.rlhf"))


def formatted(text: str) -> str:
    result, problems = format_text(SourceFile("t", text))
    assert result is not None and problems == []
    return result


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('model a{from="x/y",dtype=bf16,}', 'model a { from = "x/y", dtype = bf16 }\n'),
        ("k n { }\n", "k n { }\n"),
        ("k n {\n\n}\n", "k n { }\n"),
        ("k n {a=1\n}", "k n {\n  a = 1\n}\n"),
        ("k n { a = 1,\nb { c = 2 }, d = 3 }", "k n {\n  a = 1\n  b { c = 2 }\n  d = 3\n}\n"),
        ("k n {\na = 1\nlong = 2\n}\n", "k n {\n  a    = 1\n  long = 2\n}\n"),
        ("k n {\na = 1\n\nlong = 2\n}\n", "k n {\n  a = 1\n\n  long = 2\n}\n"),
        ("k n {\na = 1 # x\nlong = 200# y\n}\n", "k n {\n  a    = 1    # x\n  long = 200  # y\n}\n"),
        ("k n {\n# above\na = 1,\n# below\n}\n", "k n {\n  # above\n  a = 1\n  # below\n}\n"),
        ("k n { a = [ 1,2 ,] }\n", "k n { a = [1, 2] }\n"),
        ("k n {\na = [1,\n2]\n}\n", "k n {\n  a = [\n    1,\n    2,\n  ]\n}\n"),
        ("k n {\na = [\n1, # one\n2 # two\n]\n}\n", "k n {\n  a = [\n    1,  # one\n    2,  # two\n  ]\n}\n"),
        ("k n { a=-1,b=2*-(3+x.y) ,c=min( 1,2 ) }\n", "k n { a = -1, b = 2 * -(3 + x.y), c = min(1, 2) }\n"),
        ("param a:int|float=1\nlet b=2\n", "param a: int|float = 1\nlet b = 2\n"),
        ("k a {\nb = 1\n}\nk c { }\n", "k a {\n  b = 1\n}\n\nk c { }\n"),
        ("k c { }\n# about a\nk a {\nb = 1\n}\n", "k c { }\n\n# about a\nk a {\n  b = 1\n}\n"),
        ("\n\n\nk a { }\n\n\n\nk b { }\n\n\n", "k a { }\n\nk b { }\n"),
        ("k a { }\r\nk b { }\r\n", "k a { }\nk b { }\n"),
        (
            'stage  sft  b  from stage.a{lr=1}\nextends   "x.rlhf"\n',
            'stage sft b from stage.a { lr = 1 }\nextends "x.rlhf"\n',
        ),
        ("k n { # why\n a = 1 }", "k n {  # why\n  a = 1\n}\n"),
        ("#a  \n#b\t\nk a { }", "#a\n#b\nk a { }\n"),
    ],
)  # fmt: skip
def test_the_one_form(text, form):
    assert formatted(text) == form
    assert formatted(form) == form


def test_what_is_too_wide_is_broken():
    text = "k n { " + ", ".join(f"name_{i} = {i}" for i in range(20)) + " }  # many\n"
    result = formatted(text)
    assert result.startswith("k n {\n  name_0  = 0\n") and result.endswith("\n}  # many\n")
    assert result.count("\n") == 22
    assert formatted("k n { a = [" + "1000000, " * 20 + "] }\n").count("\n") == 24


@pytest.mark.parametrize("path", [*OK, *BAD, *RECIPES], ids=lambda path: path.stem)
def test_it_says_the_same_and_keeps_its_comments(path):
    text = path.read_text(encoding="utf-8")
    result, problems = format_text(SourceFile("t", text))
    if result is None:
        assert problems
        return
    assert layout(result) == result
    assert [c.rstrip() for c in re.findall("#.*", result)] == [c.rstrip() for c in re.findall("#.*", text)]
    assert bare(parse(SourceFile("t", result))[0]) == bare(parse(SourceFile("t", text))[0])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_have_the_one_form(path):
    text = path.read_text(encoding="utf-8")
    assert formatted(text) == text


def scrambled(text: str, rng: random.Random) -> str:
    """The same recipe with other space, blank lines and comments."""
    tokens = re.findall(r'"[^"\n]*"|#[^\n]*|\w[\w.%]*|\s+|.', text)
    out = []
    for token in tokens:
        if token.isspace():
            token = token.count("\n") * ("\n" * rng.randint(1, 3)) or " " * rng.randint(1, 3)
            token = token.replace("\n", rng.choice(["\n", "  # c\n"]), 1) if out[-1][:1] != "#" else token
        out.append(token)
    return "".join(out)


def test_scrambled_recipes_come_back():
    rng = random.Random(1)
    for path in (CORPUS / "ok" / "everything.rlhf", CORPUS / "ok" / "layers.rlhf"):
        text = path.read_text(encoding="utf-8")
        for _ in range(10):
            result = formatted(scrambled(text, rng))
            assert bare(parse(SourceFile("t", result))[0]) == bare(parse(SourceFile("t", text))[0])
