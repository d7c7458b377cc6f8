"""The parse loop, with recovery, so that one run gives every syntax error of a text.

At an error the parser goes on as if a missing token stood there, where that is plain. Otherwise its stack is
cut back to a state that accepts a broken statement (`_ERROR` in the grammar), and the text is skipped to that
statement's end. This is the one module that touches lark's insides: its stacks and its line counter.
"""

from __future__ import annotations

import re
from typing import Any

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput, UnexpectedToken

from rlhfdsl.language.diagnostics import Diagnostic
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.wording import PIECE, Wording

_ERROR_LIMIT = 100
_STATEMENT = re.compile(r'[ \t]*[A-Za-z_][\w.-]*[ \t]*(=(?!=)|\{|"[^"\n]*"[ \t]*\{|[A-Za-z_][\w-]*[ \t]*\{)')
# What only stands at the top level: at the start of a line it tells that the block above was not closed.
_TOP = re.compile(
    r'(?:recipe|cluster|model|data|blend|parallel|stage)\b[ \t]+["\w][^={\n]*\{|param[ \t]+\w+[ \t]*:'
)
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


def parse_all(lark: Lark, source: SourceFile, start: str) -> tuple[Tree[Token] | None, list[Diagnostic]]:
    """Parse with recovery: the tree of what could be read (None for nothing), and every syntax error."""
    recovery = _Recovery(lark, source, start)
    return recovery.run(), recovery.wording.problems


class _Recovery:
    """One parse: lark's interactive parser, and what was said so far."""

    def __init__(self, lark: Lark, source: SourceFile, start: str) -> None:
        self.text = source.text if source.text.endswith("\n") or start != "start" else source.text + "\n"
        self.wording = Wording(lark, source, self.text)
        self.interactive: Any = lark.parse_interactive(self.text, start=start)
        self.parser = self.interactive.parser_state
        self.states = self.parser.parse_conf.parse_table.states

    def run(self) -> Tree[Token] | None:
        """Feed every token; at each error recover and go on, or give up with None."""
        while len(self.wording.problems) < _ERROR_LIMIT:
            try:
                for token in self.interactive.lexer_thread.lex(self.parser):
                    if token.column == 1 and token.type == "NAME":
                        self.close_before(token)
                    self.interactive.feed_token(token)
                tree: Tree[Token] = self.interactive.feed_token(Token("$END", "", len(self.text)))
                return tree
            except UnexpectedInput as error:
                error.interactive_parser = self.interactive
                if not self.recover(error):
                    return None
        return None

    def innermost(self) -> Token | None:
        """The innermost bracket that is open; one whose closing bracket follows it on the stack is not."""
        closed = 0
        for value in reversed(self.parser.value_stack):
            if isinstance(value, Token) and value.type in _CLOSERS:
                closed += 1
            elif isinstance(value, Token) and value.type in _OPENERS:
                if not closed:
                    return value
                closed -= 1
        return None

    def accepts(self, token: str) -> bool:
        """Whether the state on top has an action for a token."""
        return token in self.states[self.parser.state_stack[-1]]

    def pop(self) -> Any:
        """Take one state and its value off the stacks."""
        self.parser.state_stack.pop()
        return self.parser.value_stack.pop()

    def recover(self, error: UnexpectedInput) -> bool:
        """Describe the error and put the parser behind it; False gives up."""
        opener = self.innermost()
        if isinstance(error, UnexpectedToken) and error.token.type == "$END":
            if opener is None:
                self.wording.describe(error)
                return False
            self.wording.unclosed(opener)
            return self.close_blocks(len(self.text))
        at = error.token.start_pos if isinstance(error, UnexpectedToken) else error.pos_in_stream
        at = len(self.text) if at is None else at
        line = self.text.rfind("\n", 0, at) + 1
        fresh = not self.text[line:at].strip() and (_STATEMENT.match(self.text, line) or self.text[at] == "}")
        # A new statement on a new line inside an open list: the list is to blame, not the statement.
        if fresh and opener is not None and opener.type != "LBRACE":
            self.wording.unclosed(opener)
            return self.skip(at, resume_here=True)
        code = self.wording.describe(error, opener)
        if isinstance(error, UnexpectedToken) and self.repair(error.token, code):
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
            if opener is None or (opener.start_pos or 0) < line or not self.accepts("RBRACE"):
                break
            self.interactive.feed_token(Token("RBRACE", "}", end, end_pos=end))

    def repair(self, token: Token, code: str) -> bool:
        """Go on as if the token that is missing stood there, or the one too many did not."""
        stacks = list(self.parser.state_stack), list(self.parser.value_stack)
        at = token.start_pos or 0
        feed: list[Token] = []
        if code == "E0112" and token.type == "_NL":
            if self.text[at:].lstrip()[:1] != "{":
                if not self.wording.deeper(at):
                    return False
                feed = [Token("LBRACE", "{", at, end_pos=at), token]
        elif code == "E0112":
            if not isinstance(self.parser.value_stack[-1], Token):
                return False
            # `actor model = …, lr = … }`: what was read as a name is the first setting.
            feed = [Token("LBRACE", "{", at, end_pos=at), self.pop(), token]
        elif code in _REPAIRS:
            insert, keep = _REPAIRS[code]
            feed = [Token(insert, "", at, end_pos=at)] if insert else []
            feed += [token] if keep and token.type != "COMMA" else []
        else:
            return False
        try:
            for item in feed:
                self.interactive.feed_token(item)
        except (UnexpectedToken, AttributeError):
            self.parser.state_stack[:], self.parser.value_stack[:] = stacks
            return False
        return True

    def skip(self, at: int, resume_here: bool) -> bool:
        """Drop the broken statement: cut the stack back, and go on where the text's next statement begins."""
        depth = 0
        opener = self.innermost()
        whole = opener is None or opener.type == "LBRACE"
        if whole and not resume_here and "_NL" in self.interactive.accepts():
            # What stands before is complete: it is kept, and only the rest of the line is dropped.
            self.interactive.feed_token(Token("_NL", "\n", at, end_pos=at))
        while not self.accepts("_ERROR"):
            if not self.parser.value_stack:
                return False
            value = self.pop()
            if isinstance(value, Token):
                depth += (value.type in _OPENERS) - (value.type in _CLOSERS)
        to = at if resume_here else self.end_of_statement(at, depth, self.accepts("RBRACE"))
        self.move(to)
        self.interactive.feed_token(Token("_ERROR", self.text[at:to], at, end_pos=to))
        if resume_here:
            self.interactive.feed_token(Token("_NL", "\n", at, end_pos=at))
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

    def move(self, to: int) -> None:
        """Set the lexer to an offset: forward, or back when it has already read past it."""
        counter = self.interactive.lexer_thread.state.line_ctr
        if counter.char_pos > to:
            line, column = self.wording.source.position(to)
            counter.char_pos, counter.line, counter.column = to, line, column
            counter.line_start_pos = to - column + 1
        else:
            counter.feed(self.text[counter.char_pos : to])

    def close_before(self, token: Token) -> None:
        """Close the open blocks before a block that can only stand at the top level."""
        opener = self.innermost()
        if opener is not None and _TOP.match(self.text, token.start_pos or 0):
            self.wording.unclosed(opener)
            self.close_blocks(token.start_pos or 0)

    def close_blocks(self, at: int) -> bool:
        """Drop what is unfinished and close every block, so that all that was read is kept."""
        while self.innermost() is not None:
            if self.accepts("RBRACE"):
                try:
                    self.interactive.feed_token(Token("RBRACE", "}", at, end_pos=at))
                    continue
                except UnexpectedToken:
                    pass
            self.pop()
        if self.accepts("_NL"):
            self.interactive.feed_token(Token("_NL", "\n", at, end_pos=at))
        return True
