"""The tables of lalr.py, _tables.py, made from grammar/rlhf.lark by lark.

`python -c "from rlhfdsl.language import tables; tables.write()"` makes them anew; a test fails when they are older than
the grammar. lark is needed here and in the tests only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfdsl.language.resources import resource

if TYPE_CHECKING:
    import lark

_FILE = Path(__file__).with_name("_tables.py")
_STARTS = ["start", "assignment"]  # a file, and a --set argument


def grammar() -> str:
    """The text of grammar/rlhf.lark."""
    return resource("grammar", "rlhf.lark").read_text(encoding="utf-8")


def build(text: str, strict: bool = False) -> lark.Lark:
    """lark's own parser of a grammar."""
    from lark import Lark

    return Lark(text, parser="lalr", start=_STARTS, propagate_positions=True, strict=strict)


def generate() -> str:
    """The text of _tables.py for the grammar."""
    from lark.parsers.lalr_analysis import Shift

    built = build(grammar())
    inner: Any = built.parser.parser
    table = inner._parse_table
    # lark numbers states and rules by the order of sets: they are numbered anew, from the starts on.
    rules = sorted(built.rules, key=lambda rule: (rule.origin.name, [s.name for s in rule.expansion], str(rule.alias)))
    order = [table.start_states[name] for name in _STARTS]
    for state in order:
        ways = sorted((str(name), what) for name, (kind, what) in table.states[state].items() if kind is Shift)
        order += [what for what in dict.fromkeys(what for _, what in ways) if what not in order]
    places = {state: number for number, state in enumerate(order)}
    numbers = {rule: number for number, rule in enumerate(rules)}
    states = [
        {
            str(name): places[what] if kind is Shift else ~numbers[what]
            for name, (kind, what) in sorted(table.states[state].items(), key=lambda entry: str(entry[0]))
        }
        for state in order
    ]
    starts, ends = ({n: places[at[n]] for n in _STARTS} for at in (table.start_states, table.end_states))
    patterns = {terminal.name: terminal.pattern for terminal in built.terminals}
    texts = {name: p.value for name, p in sorted(patterns.items()) if p.type == "str" and p.value.isidentifier()}
    # No terminal begins as another one does, so that their order decides nothing.
    terminals = [(name, pattern.to_regexp()) for name, pattern in sorted(patterns.items()) if name not in texts]
    words = {text: name for name, text in texts.items()}
    return (
        '"""Generated from grammar/rlhf.lark by tables.py."""\n\n# ruff: noqa\nfrom typing import Any\n\n'
        f"TERMINALS: list[tuple[str, str]] = {terminals!r}\nKEYWORDS: dict[str, str] = {words!r}\n"
        f"IGNORED: list[str] = {sorted(built.ignore_tokens)!r}\n"
        f"START: dict[str, int] = {starts!r}\nEND: dict[str, int] = {ends!r}\n"
        f"RULES: list[tuple[Any, ...]] = {[_rule(rule) for rule in rules]!r}\n"
        f"ACTIONS: list[dict[str, int]] = {states!r}\n"
    )


def _rule(rule: Any) -> tuple[Any, ...]:
    """(origin, size, name, only child stands for it, parts), as lark's tree builder decides them."""
    options, expansion = rule.options, rule.expansion
    absent = [0] * (len(expansion) + 1)
    if options.empty_indices:
        absent = [len(ones) for ones in "".join(str(int(b)) for b in options.empty_indices).split("0")]
    parts: list[Any] = []
    for index, symbol in enumerate(expansion):
        parts += [None] * absent[index]
        if not (symbol.is_term and symbol.filter_out):
            parts.append((index, not symbol.is_term and symbol.name.startswith("_")))
    parts += [None] * absent[-1]
    name = str(rule.alias or options.template_source or rule.origin.name)
    return str(rule.origin.name), len(expansion), name, bool(options.expand1 and not rule.alias), tuple(parts)


def write() -> None:
    """Write _tables.py anew."""
    _FILE.write_text(generate(), encoding="utf-8")
