"""What a block lacks, what excludes each other in it, and the defaults of what is not written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhfdsl.language import schema
from rlhfdsl.language.diagnostics import Diagnostic, Label, Span
from rlhfdsl.language.recipe import Origin, Setting
from rlhfdsl.language.schema import Attr, Definition
from rlhfdsl.language.suggest import listed

_STRENGTH = {"default": 0, "base": 1, "file": 2, "param": 2, "profile": 3, "set": 4}

_DURATIONS = ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def missing(
    definition: Definition, address: str, header: Span, present: Iterable[str], inside: str
) -> Iterator[Diagnostic]:
    """Required attributes and blocks that are not there; `inside` names a block that is not written."""
    there = set(present)
    lacks = [name for name in definition.required if name not in there]
    wanted = [
        definition.attributes[name].example if name in definition.attributes else f"{name} {{ … }}"
        for name in lacks
    ]
    if definition.one_of and not there & set(definition.one_of):
        lacks.append("` or `".join(definition.one_of))
        wanted.append("` or `".join(definition.attributes[name].example for name in definition.one_of))
    for name, needs in definition.needs.items():
        if name in there and len(there & set(definition.one_of)) == 1 and name in definition.one_of:
            absent = [need for need in needs if need not in there]
            lacks += absent
            wanted += [definition.attributes[need].example for need in absent]
    if definition.free is not None and definition.table.get("minProperties") and not there:
        help = "write for example `NAME = 50%`"
        yield Diagnostic("E0305", "error", f"`{address}` is empty", header, help=help)
    if lacks:
        help = "write " + ", ".join(f"`{line}`" for line in wanted)
        if inside:
            help = f"write `{inside} {{ {', '.join(wanted)} }}`"
        yield Diagnostic("E0305", "error", f"`{address}` lacks {listed(lacks)}", header, help=help)


def together(
    definition: Definition,
    address: str,
    settings: Mapping[str, Setting],
    places: Mapping[str, Span],
    complete: bool,
) -> Iterator[Diagnostic]:
    """Attributes that exclude each other, and those that do nothing without another one."""
    clash: set[str] = set()
    for group in definition.exclusive:
        both = [name for name in group if name in places]
        if len(both) > 1:
            clash |= set(both)
            first, second = sorted(both, key=lambda name: places[name])[:2]
            message = f"`{first}` and `{second}` exclude each other in `{address}`"
            label = (Label(places[first], "one of them"),)
            help = "keep one of them"
            yield Diagnostic("E0310", "error", message, places[second], "and the other", label, help=help)
    if clash:
        return
    for name, needs in definition.needs.items():
        if name not in settings or name in definition.one_of:
            continue
        for need in needs:
            absent = need not in places and complete
            off = need in settings and settings[need].value is None
            # What a stronger layer turned off is not the weaker one's mistake, which cannot take it back.
            if absent or (off and strength(settings[need]) <= strength(settings[name])):
                message = f"`{name}` has no effect without `{need}`"
                help = f"delete it, or write `{definition.attributes[need].example}`"
                yield Diagnostic("E0311", "error", message, places[name], help=help)


def strength(setting: Setting) -> int:
    """How strong the layer is that a setting stands in."""
    return _STRENGTH[setting.origin.layer]


def with_defaults(
    definition: Definition, written: Mapping[str, Setting], name: str | None
) -> dict[str, Setting]:
    """Every attribute of the type in the table's order, with the default of what is not written."""
    if definition.free is not None:
        return dict(written)
    beside = definition.table.get("x-defaults-with", {})
    replaced = {
        key: value for other, values in beside.items() if other in written for key, value in values.items()
    }
    out_of_play = {n for group in definition.exclusive for n in group if any(m in written for m in group)}
    settings: dict[str, Setting] = {}
    for key, attr in definition.attributes.items():
        if key in written:
            settings[key] = written[key]
            continue
        value = replaced.get(key, attr.table.get("default"))
        if key in out_of_play:
            value = None
        if "x-default" in attr.table:
            value = attr.table["x-default"].format(name=name)
        if "x-default-from" in attr.table and attr.table["x-default-from"] in written:
            value = written[attr.table["x-default-from"]].value
        value = tuple(value) if isinstance(value, list) else value
        settings[key] = Setting(value, None, Origin("default", "", shown(value, attr)))
    return settings


def shown(value: Any, attr: Attr) -> str:
    """A plain value as a recipe would write it; empty for none."""
    if value is None:
        words = [schema.none_word(a) for a in attr.alternatives if schema.shape(a) == "none"]
        return words[0] if words else ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "[" + ", ".join(shown(item, attr) for item in value) + "]"
    if isinstance(value, float) and any(schema.shape(a) == "duration" for a in attr.alternatives):
        size, unit = next((size, unit) for size, unit in _DURATIONS if value % size == 0 or unit == "s")
        return f"{value / size:g}{unit}"
    return str(value)
