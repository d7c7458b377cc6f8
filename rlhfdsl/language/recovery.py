"""The parse loop, with recovery, so that one run gives every syntax error of a text.

At an error the parser goes on as if a missing token stood there, where that is plain. Otherwise its stack is
cut back to a state that accepts a broken statement (`_ERROR` in the grammar), and the text is skipped to that
statement's end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhfdsl.language.braces import TOP, Missing, unpaired
from rlhfdsl.language.diagnostics import Diagnostic
from rlhfdsl.language.lalr import END, Parser, Token, Tree, Unexpected
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.wording import PIECE, Wording

_ERROR_LIMIT = 100
_STATEMENT = re.compile(r'[ \t]*[A-Za-z_][\w.-]*[ \t]*(=(?!=)|\{|"[^"\n]*"[ \t]*\{|[A-Za-z_][\w-]*[ \t]*\{)')
_OPENERS = ("LSQB", "LPAR", "LBRACE")
_CLOSERS = ("RSQB", "RPAR", "RBRACE")

# code: (token that is put in, whether the token at the error stays behind it)
_REPAIRS = {
    "E0104": ("COMMA", True),
    "E0106": ("EQUAL", False),
    "E0113": ("COMMA", True),
    "E0114": ("", False),
    "E0116": ("_NL", True),
}


def parse_all(source: SourceFile, start: str) -> tuple[Tree | None, list[Diagnostic]]:
    """Parse with recovery: the tree of what could be read (None for nothing), and every syntax error."""
    recovery = _Recovery(source, start)
    tree = recovery.run()
    if recovery.wording.problems:
        missing, extra = unpaired(recovery.text)
        if missing or extra:
            recovery = _Recovery(source, start, missing, extra)
            tree = recovery.run()
    return tree, sorted(recovery.wording.problems, key=lambda problem: problem.span.start if problem.span else 0)


class _Recovery:
    """One parse: the parser, and what was said so far.

    A block of which it is known that its `}` is `missing` gets it there, and the braces at `extra` are not read.
    """

    def __init__(
        self, source: SourceFile, start: str, missing: Sequence[Missing] = (), extra: Sequence[int] = ()
    ) -> None:
        self.text = source.text if source.text.endswith("\n") or start != "start" else source.text + "\n"
        self.wording = Wording(source, self.text)
        self.missing = list(missing)
        read = list(self.text)
        for at in extra:
            read[at] = " "
            self.wording.extra(at)
        self.parser = Parser("".join(read), start)

    def run(self) -> Tree | None:
        """Feed every token; at each error recover and go on, or give up with None."""
        while len(self.wording.problems) < _ERROR_LIMIT:
            try:
                while (token := self.token()) is not None:
                    if token.type == "NAME" and self.text[token.start_pos - 1 : token.start_pos] in ("", "\n"):
                        self.close_before(token)
                    self.parser.feed(token)
                tree: Tree = self.parser.feed(Token(END, "", len(self.text)))
                return tree
            except Unexpected as error:
                if not self.recover(error):
                    return None
        return None

    def token(self) -> Token | None:
        """The next token, behind a `}` that is known to be missing before it. Raises Unexpected."""
        while self.missing and self.missing[0].before <= self.parser.at:
            lacks = self.missing.pop(0)
            self.wording.unclosed(Token("LBRACE", "{", lacks.opener), lacks.at, lacks.text)
            while self.accepts("RBRACE") and (opener := self.innermost()) and opener.start_pos >= lacks.opener:
                self.parser.feed(Token("RBRACE", "}", lacks.before, lacks.before))
                self.parser.feed(Token("_NL", "\n", lacks.before, lacks.before))
        return self.parser.token()

    def innermost(self) -> Token | None:
        """The innermost bracket that is open; one whose closing bracket follows it on the stack is not."""
        closed = 0
        for value in reversed(self.parser.values):
            if isinstance(value, Token) and value.type in _CLOSERS:
                closed += 1
            elif isinstance(value, Token) and value.type in _OPENERS:
                if not closed:
                    return value
                closed -= 1
        return None

    def accepts(self, token: str) -> bool:
        """Whether the state on top has an action for a token."""
        return token in self.parser.actions[self.parser.states[-1]]

    def pop(self) -> Any:
        """Take one state and its value off the stacks."""
        self.parser.states.pop()
        return self.parser.values.pop()

    def recover(self, error: Unexpected) -> bool:
        """Describe the error and put the parser behind it; False gives up."""
        opener = self.innermost()
        if error.token is not None and error.token.type == END:
            if opener is None:
                self.wording.describe(error)
                return False
            self.wording.unclosed(opener)
            return self.close_blocks(len(self.text))
        at = error.at
        line = self.text.rfind("\n", 0, at) + 1
        fresh = not self.text[line:at].strip() and (_STATEMENT.match(self.text, line) or self.text[at] == "}")
        # A new statement on a new line inside an open list: the list is to blame, not the statement.
        if fresh and opener is not None and opener.type != "LBRACE":
            self.wording.unclosed(opener, self.wording.last_code(line))
            return self.skip(at, resume_here=True)
        code = self.wording.describe(error, opener)
        if error.token is not None and self.repair(error.token, code):
            return True
        skipped = self.skip(at, resume_here=False)
        if code == "E0109" and skipped:
            self.close_line(at)
        return skipped

    def close_line(self, at: int) -> None:
        """Close the blocks that end on a line, inside a text that has no closing quote."""
        line = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        rest = self.text[at:end].replace(" ", "")
        for _ in range(len(rest) - len(rest.rstrip("}"))):
            opener = self.innermost()
            if opener is None or opener.start_pos < line or not self.accepts("RBRACE"):
                break
            self.parser.feed(Token("RBRACE", "}", end, end))

    def repair(self, token: Token, code: str) -> bool:
        """Go on as if the token that is missing stood there, or the one too many did not."""
        stacks = list(self.parser.states), list(self.parser.values)
        at = token.start_pos
        feed: list[Token] = []
        if code == "E0112" and token.type == "_NL":
            if self.text[at:].lstrip()[:1] != "{":
                if not self.wording.deeper(at):
                    return False
                feed = [Token("LBRACE", "{", at, at), token]
        elif code == "E0112":
            if not isinstance(self.parser.values[-1], Token):
                return False
            # `actor model = …, lr = … }`: what was read as a name is the first setting.
            feed = [Token("LBRACE", "{", at, at), self.pop(), token]
        elif code in _REPAIRS:
            insert, keep = _REPAIRS[code]
            feed = [Token(insert, "", at, at)] if insert else []
            feed += [token] if keep and token.type != "COMMA" else []
        else:
            return False
        if not self.parser.takes([item.type for item in feed]):
            self.parser.states[:], self.parser.values[:] = stacks
            return False
        for item in feed:
            self.parser.feed(item)
        return True

    def skip(self, at: int, resume_here: bool) -> bool:
        """Drop the broken statement: cut the stack back, and go on where the text's next statement begins."""
        depth = 0
        opener = self.innermost()
        whole = opener is None or opener.type == "LBRACE"
        if whole and not resume_here and self.text[at] != "=" and "_NL" in self.parser.accepts():
            # What stands before is complete: it is kept, and only the rest of the line is dropped. Before a second `=`
            # it only looks so: of `coef = coef = 0.2` nobody knows which is the value.
            self.parser.feed(Token("_NL", "\n", at, at))
        while not self.accepts("_ERROR"):
            if not self.parser.values:
                return False
            value = self.pop()
            if isinstance(value, Token):
                depth += (value.type in _OPENERS) - (value.type in _CLOSERS)
        to = at if resume_here else self.end_of_statement(at, depth, self.accepts("RBRACE"))
        self.parser.at = to
        self.parser.feed(Token("_ERROR", self.text[at:to], at, to))
        if resume_here:
            self.parser.feed(Token("_NL", "\n", at, at))
        return True

    def end_of_statement(self, at: int, depth: int, in_body: bool) -> int:
        """The offset of the newline, comma or `}` that ends the statement which is broken at `at`."""
        open_ = ["["] * depth
        while at < len(self.text):
            match = PIECE.match(self.text, at)
            assert match is not None
            piece = match.group()
            if piece == "\n" and (not open_ or (open_[-1] != "{" and _STATEMENT.match(self.text, at + 1))):
                return at
            if piece == "," and not open_ and in_body:
                return at
            if piece in ("[", "(", "{"):
                open_.append(piece)
            elif piece in ("]", ")", "}"):
                if piece == "}" and not open_ and in_body:
                    return at
                open_ = open_[:-1]
            at = match.end()
        return at

    def close_before(self, token: Token) -> None:
        """Close the open blocks before a block that can only stand at the top level."""
        opener = self.innermost()
        if opener is not None and TOP.match(self.text, token.start_pos):
            self.wording.unclosed(opener)
            self.close_blocks(token.start_pos)

    def close_blocks(self, at: int) -> bool:
        """Drop what is unfinished and close every block, so that all that was read is kept."""
        while self.innermost() is not None:
            if self.accepts("RBRACE"):
                try:
                    self.parser.feed(Token("RBRACE", "}", at, at))
                    continue
                except Unexpected:
                    pass
            self.pop()
        if self.accepts("_NL"):
            self.parser.feed(Token("_NL", "\n", at, at))
        return True
