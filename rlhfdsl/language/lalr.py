"""The parser: LALR(1) tables made from grammar/rlhf.lark, walked with a stack that recovery can cut.

lark builds the tables (tables.py); nothing of it is imported here, which would take longer than all the rest of
`rlhf fmt`. The trees are as lark would make them: rules that begin with `_` are taken up by the rule around them, `?`
ones by their only child, an absent `[ ]` is None, tokens that only punctuate are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

END = "$END"


class Token(str):
    """A piece of the text, of a terminal of the grammar."""

    __slots__ = ("end_pos", "outer", "start_pos", "type")
    type: str
    start_pos: int
    end_pos: int
    outer: tuple[int, int] | None

    def __new__(cls, type_: str, text: str, start: int, end: int | None = None) -> Token:
        made = super().__new__(cls, text)
        made.type, made.start_pos, made.end_pos = type_, start, start + len(text) if end is None else end
        made.outer = (made.start_pos, made.end_pos)
        return made


class Tree:
    """A rule that was read: its name, its parts, and its place, which is None for one that read nothing.

    `outer` is its place with the brackets around it, which belong to what it is a part of.
    """

    __slots__ = ("children", "data", "end_pos", "outer", "start_pos")

    def __init__(self, data: str, children: list[Any], outer: tuple[int, int] | None) -> None:
        self.data, self.children, self.outer = data, children, outer
        self.start_pos: int | None = outer[0] if outer else None
        self.end_pos: int | None = outer[1] if outer else None


class Unexpected(Exception):
    """A token that no rule takes in the state `position`, or with None a character at `at` that begins no token."""

    def __init__(self, token: Token | None, at: int, position: int, accepts: frozenset[str]) -> None:
        super().__init__(token, at)
        self.token, self.at, self.position, self.accepts = token, at, position, accepts


@cache
def scanner() -> tuple[re.Pattern[str], Mapping[str, str], frozenset[str]]:
    """The terminals as one pattern, the words that are no names, and the terminals that are skipped."""
    from rlhfdsl.language import _tables

    pattern = "|".join(f"(?P<{name}>{text})" for name, text in _tables.TERMINALS)
    return re.compile(pattern), _tables.KEYWORDS, frozenset(_tables.IGNORED)


class Parser:
    """One text on its way through the tables. `at` is where its next token begins; the stacks may be cut."""

    def __init__(self, text: str, start: str) -> None:
        from rlhfdsl.language import _tables

        self.text, self.at = text, 0
        self.actions: Sequence[Mapping[str, int]] = _tables.ACTIONS
        # (origin, size, name, only child stands for it, parts); a part is (index, take up its children), or None
        self.rules: Sequence[tuple[Any, ...]] = _tables.RULES
        self.states = [_tables.START[start]]
        self.values: list[Any] = []
        self.final = _tables.END[start]

    def run(self) -> Any:
        """Feed the rest of the text. Raises Unexpected."""
        while (token := self.token()) is not None:
            self.feed(token)
        return self.feed(Token(END, "", len(self.text)))

    def token(self) -> Token | None:
        """The next token, None at the end. Raises Unexpected for one that the state does not take."""
        pattern, keywords, ignored = scanner()
        while self.at < len(self.text):
            match = pattern.match(self.text, self.at)
            if match is None:
                raise Unexpected(None, self.at, self.states[-1], self.accepts())
            kind, piece = match.lastgroup or "", match.group()
            start, self.at = self.at, match.end()
            if kind in ignored:
                continue
            takes = self.actions[self.states[-1]]
            if kind == "NAME" and piece in keywords and (keywords[piece] in takes or "NAME" not in takes):
                kind = keywords[piece]
            token = Token(kind, piece, start, self.at)
            if kind not in takes:
                raise Unexpected(token, start, self.states[-1], self.accepts())
            return token
        return None

    def feed(self, token: Token) -> Any:
        """Take a token; the value of the whole text for END, else None. Raises Unexpected."""
        while True:
            action = self.actions[self.states[-1]].get(token.type)
            if action is None:
                raise Unexpected(token, token.start_pos, self.states[-1], self.accepts())
            if action >= 0:
                self.states.append(action)
                self.values.append(token)
                return None
            rule = self.rules[~action]
            size = rule[1]
            parts: list[Any] = []
            if size:
                parts = self.values[-size:]
                del self.states[-size:]
                del self.values[-size:]
            value = _value(rule, parts)
            self.states.append(self.actions[self.states[-1]][rule[0]])
            self.values.append(value)
            if token.type == END and self.states[-1] == self.final:
                return value

    def accepts(self) -> frozenset[str]:
        """The terminals that can come next, told by trying each on a copy of the stack."""
        return frozenset(name for name in self.actions[self.states[-1]] if name.isupper() and self.takes([name]))

    def takes(self, names: Iterable[str]) -> bool:
        """Whether tokens of these terminals can come next, one after the other."""
        states = list(self.states)
        for name in names:
            while True:
                action = self.actions[states[-1]].get(name)
                if action is None:
                    return False
                if action >= 0:
                    states.append(action)
                    break
                rule = self.rules[~action]
                if rule[1]:
                    del states[-rule[1] :]
                states.append(self.actions[states[-1]][rule[0]])
                if name == END and states[-1] == self.final:
                    break
        return True


def _value(rule: tuple[Any, ...], parts: list[Any]) -> Any:
    """The tree of a rule that read `parts`, or its only child where that stands for it."""
    _, _, name, only, taken = rule
    children: list[Any] = []
    for part in taken:
        if part is None:
            children.append(None)
        elif part[1]:
            taken_up = parts[part[0]].children
            children = children + taken_up if children else taken_up  # a list that grows to the left is not copied
        else:
            children.append(parts[part[0]])
    places = [place for part in parts if (place := part.outer) is not None]
    outer = (places[0][0], places[-1][1]) if places else None
    if only and len(children) == 1:
        children[0].outer = outer
        return children[0]
    return Tree(name, children, outer)
