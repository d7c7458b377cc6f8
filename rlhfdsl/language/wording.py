"""What to say about a syntax error: looked up by parser state and token, in a table made from wrong texts."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from rlhfdsl.language.diagnostics import Diagnostic, Edit, Fix, Span
from rlhfdsl.language.lalr import END, Parser, Token, Unexpected
from rlhfdsl.language.source import SourceFile

_TWO_NAMES = re.compile(r"[A-Za-z_]\w*[ \t]+[A-Za-z_]\w*[ \t]*\Z")
PIECE = re.compile(r'"(?:[^"\\\n]|\\.)*"?|#[^\n]*|[\[({]|[\])}]|\n|,|[^"#\[\](){},\n]+')


def _inside(text: str) -> str:
    return f"k n {{\n{text}\n}}\n"


# code: wrong texts that end in the parser state which the code is about
_SAMPLES = {
    "E0102": (_inside("a ="), _inside("a = [1,"), "k n { a = , b = 1 }\n", "k n { a = }\n", "let x =\n",
              _inside("a = 1 +"), _inside("a = 1 *"), _inside("a = -"), "param x: int =\n"),
    "E0103": (_inside('a "x"'), _inside("a 3"), _inside("a [1]"), _inside("a (1)"), 'k n { a "x", b = 1 }\n'),
    "E0104": (_inside("a = [1 2]"), _inside('a = ["x" "y"]'), _inside("a = [x y]"), _inside("a = [\n1\n2\n]"),
              _inside("a = [\n1,\n2\n3\n]"), _inside("a = [1\n 2 ]"), _inside("a = min(1 2)")),
    "E0105": ("}\n", "k {\n}\n}\n"),
    "E0106": (_inside("a: 1"),),
    "E0111": ("a = 1\n", "a.b = 1\n"),
    "E0112": ("k n\n{\n}\n", 'k "n"\n{\n}\n', "k\n{\n}\n", "k n m\n{\n}\n"),
    "E0113": (_inside("a = 1 b = 2"), _inside('a = "x" b = 2'), 'k n { a = "x" b = 2 }\n', 
              _inside("a = x b = 2"),
              _inside("a = x.y b = 2"), _inside("a = [1] b = 2"), _inside("a { } b = 2"),
              _inside("a { x = 1 } b = 2"),
              "k n {\nm {\na = 1 } b = 2\n}\n"),
    "E0114": ("k n { a = 1,, b = 2 }\n", "k n { , a = 1 }\n", _inside("a = 1\n, b = 2")),
    "E0115": ("k a b c { }\n", 'k "a" b { }\n'),
    "E0116": ("k a { }, k b { }\n", "k a { } k b { }\n"),
}  # fmt: skip

_MESSAGES = {
    "E0102": ("a value is missing here", "expected a value", "for example `lr = 1e-6`"),
    "E0103": ("`=` is missing between a name and its value", "expected `=`", "write `name = value`"),
    "E0104": ("a comma is missing between two values", "expected `,` or the closing bracket", None),
    "E0105": (
        "this `}` closes nothing",
        "no block is open here",
        "delete it, or open the block that it should close",
    ),
    "E0106": ("a setting is written with `=`, not with `:`", "expected `=`", "write `name = value`"),
    "E0111": (
        "a setting stands outside a block",
        "not in a block",
        "put it into the block that it belongs to",
    ),
    "E0112": (
        "a block begins with its kind, its name and `{` on one line",
        "expected `{`",
        "write `kind name {`",
    ),
    "E0113": (
        "two members stand on one line",
        "expected a comma or a new line",
        "put a comma or a newline between them",
    ),
    "E0114": ("a comma has nothing before it", "no member before this comma", "delete it"),
    "E0115": (
        "a block has too many names",
        "one name too many",
        "a stage has a kind and a name, other blocks a name",
    ),
    "E0116": (
        "a top-level block starts on its own line",
        "expected a new line",
        "put a newline between them",
    ),
}

_NAMES = {
    "NAME": "a name", "NUMBER": "a number", "STRING": "a text", "_NL": "a new line", "EQUAL": "`=`",
    "LBRACE": "`{`", "RBRACE": "`}`", "LSQB": "`[`", "RSQB": "`]`", "LPAR": "`(`", "RPAR": "`)`", 
    "COMMA": "`,`", "DOT": "`.`",
    "COLON": "`:`", "PLUS": "an operator", "MINUS": "an operator",
    "STAR": "an operator", "SLASH": "an operator",
    "VBAR": "`|`", "$END": "the end", "FROM": "`from`", "AS": "`as`",
}  # fmt: skip


@cache
def _labels() -> dict[tuple[int, str | None], str]:
    table: dict[tuple[int, str | None], str] = {}
    for code, texts in _SAMPLES.items():
        for text in texts:
            try:
                Parser(text, "start").run()
            except Unexpected as error:
                if error.token is not None:
                    table.setdefault((error.position, error.token.type), code)
                    table.setdefault((error.position, None), code)
    return table


_PARTNERS = {"{": "}", "[": "]", "(": ")"}
_LETTERS = "a name holds the letters a to z and A to Z, digits and `_`; any letter may stand in a text, in quotes"
_QUOTES = 'write "…", with straight quotes'


class Wording:
    """The diagnostics of one text; `problems` grows with each error that is described."""

    def __init__(self, source: SourceFile, text: str) -> None:
        self.source = source
        self.text = text
        self.problems: list[Diagnostic] = []

    def add(self, code: str, message: str, start: int, end: int, **more: Any) -> None:
        """A diagnostic for a piece of the text, without the final newline that the parser was given."""
        end = max(start, min(end, len(self.source.text)))
        span = Span(self.source.name, min(start, len(self.source.text)), end)
        self.problems.append(Diagnostic(code, "error", message, span, **more))

    def unclosed(self, opener: Token, at: int | None = None, closing: str = "") -> None:
        """An opening bracket without its partner, which is to be written at `at`, as `closing`, where that is known."""
        start, partner = opener.start_pos, _PARTNERS[opener]
        help, fixes = f"write its `{partner}` where the block ends", list[Fix]()
        if at is not None:
            where = "below" if closing.startswith("\n") else "at the end of"
            help = f"write `{partner}` {where} line {self.source.position(at)[0]}"
            fixes = [Fix(help, (Edit(Span(self.source.name, at, at), closing or partner),))]
        message = f"this `{opener}` is never closed"
        self.add("E0107", message, start, start + 1, label="opened here", help=help, fixes=tuple(fixes))

    def extra(self, at: int) -> None:
        """A brace that is one too many."""
        code = "E0105" if self.text[at] == "}" else "E0101"
        message = "this `}` is one too many: its block goes on below" if code == "E0105" else "`{` cannot stand here"
        fixes = (Fix("delete it", (Edit(Span(self.source.name, at, at + 1), ""),)),)
        self.add(code, message, at, at + 1, help="delete it", fixes=fixes)

    def describe(self, error: Unexpected, opener: Token | None = None) -> str:
        """One diagnostic for one error of the parser's, inside the open bracket `opener`; returns its code."""
        token, at = error.token, error.at
        if token is None:
            self.describe_character(at)
            return self.problems[-1].code
        code = self.code(error, token.type, opener)
        start = self.end_of_code(at) if token.type == "_NL" else at
        end = start + 1 if token.type in ("_NL", END) else token.end_pos
        if code in ("E0108", "E0110"):
            self.describe_character(start)
        elif code in _MESSAGES:
            message, label, help = _MESSAGES[code]
            fixes: tuple[Fix, ...] = ()
            if code == "E0106":
                fixes = (Fix("write `=`", (Edit(Span(self.source.name, start, end), " ="),)),)
            self.add(code, message, start, end, label=label, help=help, fixes=fixes)
        else:
            what = {"_NL": "the line ends too early", "$END": "the text ends too early"}.get(token.type)
            allowed = {_NAMES.get(name, f"`{name.lower()}`") for name in error.accepts}
            *most, last = sorted(allowed - {"`_error`"}) or [""]
            label = "expected " + (", ".join(most) + " or " if most else "") + last if last else ""
            if token.type == "EQUAL" and "PLUS" in error.accepts:
                label = "a value stands before it: a setting has one `=`"
            self.add("E0101", what or f"`{token}` cannot stand here", start, end, label=label)
        return code

    def code(self, error: Unexpected, token: str, opener: Token | None) -> str:
        """Which mistake it is: by state and terminal, corrected where states of different places are one."""
        at = error.at
        in_list = opener is not None and opener.type != "LBRACE"
        touches = at > 0 and (self.text[at - 1].isalnum() or self.text[at - 1] == "_")
        after = self.text[at + 1 : at + 2]
        if token == "DOT" and after.isdigit():
            return "E0110"
        if token == "MINUS" and touches and after.isalpha() and not in_list:
            return "E0110"
        if token in ("SLASH", "STAR") and {self.text[at - 1 : at + 1], self.text[at : at + 2]} & {"//", "/*"}:
            return "E0108"
        if token == "RBRACE" and opener is None:
            return "E0105"
        table, state = _labels(), error.position
        code = table.get((state, token)) or table.get((state, None), "E0101")
        if code == "E0101" and error.accepts >= {"NUMBER", "STRING", "LSQB"}:
            code = "E0102"
        if code in ("E0103", "E0112") and token == "_NL":
            below = self.text[at:].lstrip()[:1] == "{"
            return "E0112" if below or opener is None or self.deeper(at) else "E0103"
        line = self.text.rfind("\n", 0, at) + 1
        if token == "EQUAL" and _TWO_NAMES.search(self.text, line, at) and self.closes_on_line(at):
            return "E0112"
        if code in ("E0113", "E0116") and token in ("NAME", "COMMA"):
            code = "E0116" if opener is None else "E0113"
        fits = {
            "E0103": token in ("STRING", "NUMBER", "LSQB", "LPAR", "MINUS", "RBRACE", "COMMA"),
            "E0104": in_list,
            "E0105": token == "RBRACE",
            "E0106": token == "COLON",
            "E0112": token == "_NL",
            "E0113": token == "NAME" and not in_list,
            "E0114": token == "COMMA",
            "E0115": token in ("NAME", "STRING"),
            "E0116": token in ("NAME", "COMMA"),
        }
        return code if fits.get(code, True) else "E0101"

    def deeper(self, newline: int) -> bool:
        """Whether the next line that holds something is indented deeper than the one that ends here."""
        line = self.text[self.text.rfind("\n", 0, newline) + 1 : newline]
        below = self.text[newline:].lstrip("\r\n")
        below = below[: below.find("\n")] if "\n" in below else below
        return bool(below.strip()) and len(below) - len(below.lstrip()) > len(line) - len(line.lstrip())

    def closes_on_line(self, at: int) -> bool:
        """Whether a `}` on the rest of the line closes a block that this line did not open."""
        depth = 0
        while at < len(self.text):
            match = PIECE.match(self.text, at)
            assert match is not None
            piece = match.group()
            if piece == "\n":
                return False
            depth += (piece == "{") - (piece == "}")
            if depth < 0:
                return True
            at = match.end()
        return False

    def end_of_code(self, newline: int) -> int:
        """Where the code of a line ends, before spaces and a comment."""
        end = at = self.text.rfind("\n", 0, newline) + 1
        while at < newline and self.text[at] != "#":
            match = PIECE.match(self.text, at)
            assert match is not None
            end = at + len(match.group().rstrip()) if match.group().strip() else end
            at = match.end()
        return end

    def last_code(self, line: int) -> int:
        """Where the last code above the line that begins at `line` ends."""
        while (end := self.end_of_code(line - 1)) == (above := self.text.rfind("\n", 0, line - 1) + 1):
            line = above
        return end

    def describe_character(self, at: int) -> None:
        rest = self.text[at : at + 2]
        line_end = self.text.find("\n", at)
        before = self.text[max(0, at - 1) : at + 1]
        if rest in ("//", "/*") or before in ("//", "/*"):
            start = at if rest in ("//", "/*") else at - 1
            self.add("E0108", "a comment starts with `#`", start, start + 2, help="write `# …`")
        elif rest[:1] == '"':
            help = 'write \\" for a quote inside a text; a text ends on its line'
            self.add("E0109", "this text has no closing quote", at, line_end, help=help)
        elif rest[:1] == "'":
            self.add("E0110", "a text is written in double quotes", at, at + 1, help='write "…"')
        elif rest[:1] == ".":
            self.add("E0110", "a number starts with a digit", at, at + 1, help="write 0.5, not .5")
        elif rest[:1] == "-":
            self.add("E0110", "a name holds letters, digits and `_`", at, at + 1, help="write `_` for `-`")
        elif rest[:1] == "$":
            help = "a parameter is read as `param.name`; the environment is never read"
            self.add("E0110", "`$` has no meaning in a recipe", at, at + 1, help=help)
        elif rest[:1] == ":":
            fix = Fix("write `=`", (Edit(Span(self.source.name, at, at + 1), " ="),))
            message, label, advice = _MESSAGES["E0106"]
            self.add("E0106", message, at, at + 1, label=label, help=advice, fixes=(fix,))
        elif rest[:1] in ("+", "-", "*", "/", ",", "=", "(", ")", "[", "]", "{", "}", "%", "|"):
            self.add("E0101", f"`{rest[:1]}` cannot stand here", at, at + 1)
        else:
            name = rest[:1] if rest[:1].isprintable() and not rest[:1].isspace() else f"U+{ord(rest[:1]):04X}"
            advice = _LETTERS if rest[:1].isalpha() else _QUOTES if rest[:1] in set("“”„«»‘’") else None
            self.add("E0110", f"the character {name} has no meaning in a recipe", at, at + 1, help=advice)
