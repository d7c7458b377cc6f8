"""Colours: the generated grammar is fresh, its words are the table's, and the lexer loses nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pygments.token import Keyword, Name, Number

from rlhfdsl.language import schema
from rlhfdsl.language.resources import resource
from rlhfdsl.lsp import textmate
from rlhfdsl.lsp.highlight import RlhfLexer

CORPUS = Path(__file__).parents[1] / "corpus"
VSCODE = resource("grammar", "vscode")


def test_the_generated_grammar_is_fresh():
    assert (VSCODE / "syntaxes" / textmate.FILE).read_text(encoding="utf-8") == textmate.generate()


def test_its_patterns_compile_and_find_the_words():
    patterns = {p["name"]: p["match"] for p in textmate.grammar()["patterns"] if "match" in p and "name" in p}
    for pattern in patterns.values():
        re.compile(pattern)
    assert re.search(patterns["constant.numeric.rlhf"], "lr = 1e-5").group() == "1e-5"
    assert re.search(patterns["variable.other.member.rlhf"], "  warmup = 3%").group() == "warmup"
    assert re.search(patterns["entity.name.tag.rlhf"], "mix reward { }").group() == "mix"
    assert re.search(patterns["keyword.other.rlhf"], "model base {").group() == "model"
    assert not re.search(patterns["keyword.other.rlhf"], "  model = model.base")


def test_the_extension_names_what_is_there():
    package = json.loads((VSCODE / "package.json").read_text(encoding="utf-8"))
    named = [
        package["main"],
        package["contributes"]["grammars"][0]["path"],
        package["contributes"]["languages"][0]["configuration"],
    ]
    assert all((VSCODE / path).is_file() for path in named)
    json.loads((VSCODE / "language-configuration.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(CORPUS.rglob("*.rlhf")), ids=lambda path: path.stem)
def test_the_lexer_loses_nothing(path):
    text = path.read_text(encoding="utf-8")
    pieces = RlhfLexer(stripnl=False, ensurenl=False).get_tokens(text)
    assert "".join(piece for _, piece in pieces) == text.replace("\r\n", "\n")


def test_what_the_lexer_tells_apart():
    text = "stage ppo long from stage.ppo {\n  kl { coef = 1e-2, apply = reward }\n}\n"
    found = {piece: token for token, piece in RlhfLexer().get_tokens(text)}
    assert found["ppo"] is Keyword.Type and found["kl"] is Name.Tag and found["coef"] is Name.Attribute
    assert found["1e-2"] is Number and found["reward"] is Name.Constant and found["stage.ppo"] is Name.Variable


def test_words_are_those_of_the_table():
    assert {"kinds", "stages", "blocks", "attributes", "symbols"} == textmate.words().keys()
    assert set(textmate.words()["kinds"]) == set(schema.kinds())


def test_the_extension_is_coherent():
    package = json.loads((VSCODE / "package.json").read_text(encoding="utf-8"))
    (language,), (grammar,) = package["contributes"]["languages"], package["contributes"]["grammars"]
    assert language["extensions"] == [".rlhf"] and grammar["language"] == language["id"]
    assert json.loads((VSCODE / grammar["path"]).read_text(encoding="utf-8"))["scopeName"] == grammar["scopeName"]
    configuration = json.loads((VSCODE / language["configuration"]).read_text(encoding="utf-8"))
    assert configuration["comments"] == {"lineComment": "#"}
    assert (VSCODE / package["main"]).is_file()
    assert package["contributes"]["configuration"]["properties"]["rlhf.command"]["default"] == ["rlhf", "lsp"]
