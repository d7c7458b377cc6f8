"""Where a cursor stands, told from the tokens before it: this works in a text that cannot be parsed yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhfdsl.language import schema
from rlhfdsl.language.format import TOKEN

Where = Literal["top", "label", "from", "param type", "include", "path", "name", "value", "nothing"]


@dataclass(frozen=True, slots=True)
class Context:
    """`where` the cursor stands and what is typed so far.

    blocks: headers of the open blocks, outermost first, each its words (`stage`, `ppo`, `long`).
    statement: the words of the statement so far, without `prefix`. attribute: the name before `=`.
    prefix: the dotted word that ends at the cursor. taken: names that the innermost block already has.
    """

    where: Where
    blocks: tuple[tuple[str, ...], ...]
    statement: tuple[str, ...]
    attribute: str
    prefix: str
    taken: frozenset[str]

    @property
    def type(self) -> str | None:
        """The type of the innermost block (`stage.ppo.kl`), when the table has it."""
        return type_of(self.blocks)

    @property
    def kind(self) -> str:
        """The first word of the outermost block."""
        return self.blocks[0][0] if self.blocks and self.blocks[0] else ""


def type_of(blocks: tuple[tuple[str, ...], ...]) -> str | None:
    """The type that headers of nested blocks lead to."""
    if not blocks or not blocks[0]:
        return None
    head = blocks[0]
    inner = [block[0] for block in blocks[1:] if block]
    if head[0] == "override":
        words = head[1].split(".") if len(head) > 1 else [""]
        return None if words[0] == "stage" else _inside(words[0], [*words[2:], *inner])
    return _inside(f"stage.{head[1]}" if head[0] == "stage" and len(head) > 1 else head[0], inner)


def _inside(type_: str, blocks: list[str]) -> str | None:
    for name in blocks:
        if type_ not in schema.types() or name not in schema.definition(type_).blocks:
            return None
        type_ = schema.definition(type_).blocks[name][0]
    return type_ if type_ in schema.types() else None


def context_at(text: str, offset: int) -> Context:
    """The context of a cursor at an offset of a text."""
    blocks: list[tuple[str, ...]] = []
    names: list[set[str]] = [set()]
    brackets: list[str] = []
    statement: list[tuple[str, int, int]] = []
    for match in TOKEN.finditer(text):
        kind, piece = match.lastgroup or "", match.group()
        if match.start() >= offset:
            break
        line_end = text.find("\n", match.start())
        inside = (
            (kind == "comment" and match.end() >= offset)
            or (kind == "text" and match.end() > offset)
            or (piece == '"' and (line_end < 0 or line_end >= offset))  # a text without its closing quote
        )
        if inside:
            return Context("nothing", tuple(blocks), (), "", "", frozenset())
        if kind == "space":
            continue
        ends = kind == "line" or piece == ","
        if ends and (not brackets or brackets[-1] == "{"):
            statement = []
        elif piece == "{":
            words = _words(statement)
            names[-1].add(words[0] if words else "")
            blocks.append(words)
            names.append(set())
            brackets.append(piece)
            statement = []
        elif piece == "}":
            if "{" in brackets:
                while brackets.pop() != "{":
                    pass
                blocks.pop()
                names.pop()
            statement = []
        elif kind not in ("line", "comment"):
            brackets += [piece] if piece in ("[", "(") else []
            if piece in ("]", ")") and brackets and brackets[-1] != "{":
                brackets.pop()
            statement.append((piece, match.start(), match.end()))
            if piece == "=":
                names[-1].add(".".join(_words(statement[:-1])))
    start = offset
    while statement and statement[-1][2] == start and (statement[-1][0] == "." or statement[-1][0].isidentifier()):
        start = statement.pop()[1]
    return _classify(text[start:offset], blocks, statement, names[-1])


def _words(statement: list[tuple[str, int, int]]) -> tuple[str, ...]:
    """The words of a statement, dotted ones as one."""
    words: list[str] = []
    for piece, _, _ in statement:
        if words and (piece == "." or words[-1].endswith(".")):
            words[-1] += piece
        else:
            words.append(piece)
    return tuple(words)


def _classify(
    prefix: str, blocks: list[tuple[str, ...]], statement: list[tuple[str, int, int]], taken: set[str]
) -> Context:
    words = _words(statement)
    attribute = ""
    where: Where
    if "=" in words:
        where = "value"
        attribute = words[words.index("=") - 1] if words.index("=") else ""
    elif blocks and blocks[0][:1] == ("profile",):
        where = "path"
    elif blocks:
        where = "name" if not words else "nothing"
    elif not words:
        where = "top"
    elif words[-1] == "from" and len(words) > 2:
        where = "from"
    elif words[0] == "override":
        where = "path"
    elif words[0] == "param" and ":" in words:
        where = "param type"
    elif words[0] in ("extends", "import"):
        where = "include"
    else:
        where = "label" if len(words) == 1 else "nothing"
    return Context(where, tuple(blocks), words, attribute, prefix, frozenset(taken))
