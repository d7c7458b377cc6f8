"""The parser from tables made from the grammar: loading takes 5 ms, building 40 or, with `interegular`, 400.

`python -c "from rlhfdsl.language import tables; tables.write()"` makes _tables.py anew; a test fails when it
is older than grammar/rlhf.lark. Tables of another lark or grammar are not used: the grammar is then built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import lark
from lark.grammar import Rule
from lark.lexer import TerminalDef

from rlhfdsl.language.resources import resource

_FILE = Path(__file__).with_name("_tables.py")


def load_parser() -> lark.Lark:
    """The parser of grammar/rlhf.lark, for `start` (a file) and `assignment` (a --set argument)."""
    text = resource("grammar", "rlhf.lark").read_text(encoding="utf-8")
    try:
        from rlhfdsl.language import _tables
    except ImportError:
        return build(text)
    fresh = {"GRAMMAR": _digest(text), "LARK": lark.__version__}
    if any(getattr(_tables, name) != value for name, value in fresh.items()):
        return build(text)
    load: Callable[..., lark.Lark] = lark.Lark._load_from_dict
    return load(_tables.DATA, _tables.MEMO, propagate_positions=True)


def build(text: str, strict: bool = False) -> lark.Lark:
    """The parser built from the grammar's text."""
    return lark.Lark(
        text, parser="lalr", start=["start", "assignment"], propagate_positions=True, strict=strict
    )


def generate() -> str:
    """The text of _tables.py for the grammar and the lark that are installed."""
    text = resource("grammar", "rlhf.lark").read_text(encoding="utf-8")
    data, memo = build(text).memo_serialize([TerminalDef, Rule])
    return (
        f'"""Generated from grammar/rlhf.lark by tables.py."""\n\n'
        f"# ruff: noqa\nfrom typing import Any\n\n"
        f"GRAMMAR = {_digest(text)!r}\nLARK = {lark.__version__!r}\n"
        f"DATA: dict[str, Any] = {data!r}\nMEMO: dict[int, Any] = {memo!r}\n"
    )


def write() -> None:
    """Write _tables.py anew."""
    _FILE.write_text(generate(), encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
