"""A Pygments lexer, found by its entry point: for documentation, notebooks and rich."""

from __future__ import annotations

from typing import ClassVar

from pygments.lexer import RegexLexer, bygroups, words
from pygments.token import Comment, Keyword, Name, Number, Operator, Punctuation, String, Text, Whitespace

from rlhfdsl.language.evaluate import FUNCTIONS, TYPES
from rlhfdsl.lsp import textmate

_WORDS = textmate.words()


class RlhfLexer(RegexLexer):
    """Colours a recipe; every character comes out again."""

    name = "rlhf"
    aliases: ClassVar = ["rlhf"]
    filenames: ClassVar = ["*.rlhf"]
    mimetypes: ClassVar = ["text/x-rlhf"]

    tokens: ClassVar = {
        "root": [
            (r"\s+", Whitespace),
            (r"#[^\n]*", Comment.Single),
            (r'"(?:[^"\\\n]|\\.)*"?', String.Double),
            (r"(stage)([ \t]+)(\w+)", bygroups(Keyword.Declaration, Whitespace, Keyword.Type)),
            (words(_WORDS["kinds"], suffix=r"\b(?=[^=\n.]*\{)"), Keyword.Declaration),
            (words(textmate.FORMS, suffix=r"\b(?=[ \t]+[\w\"])"), Keyword.Namespace),
            (r"\b(?:from|as)\b(?=[ \t]+\w)", Keyword.Namespace),
            (words(FUNCTIONS, prefix=r"\b", suffix=r"\b(?=[ \t]*\()"), Name.Builtin),
            (r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", Name.Variable),
            (r"([:|][ \t]*)" + words(TYPES, suffix=r"\b").get(), bygroups(Operator, Keyword.Type)),
            (r"[A-Za-z_]\w*(?=[ \t]*=)", Name.Attribute),
            (words(_WORDS["blocks"], suffix=r"\b(?=[ \t]*(?:\w+[ \t]*)?\{)"), Name.Tag),
            (r"[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?:[A-Za-z]+\b|%)?", Number),
            (words(_WORDS["symbols"], suffix=r"\b"), Name.Constant),
            (r"[A-Za-z_]\w*", Name),
            (r"[=+\-*/|:]", Operator),
            (r"[{}\[\](),.]", Punctuation),
            (r".", Text),
        ]
    }
