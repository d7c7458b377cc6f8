"""Expressions to values: arithmetic with units, `let`, and parameters with their types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from rlhfdsl.language.describe import Symbol, Value, describe
from rlhfdsl.language.diagnostics import Diagnostic, Label, Span
from rlhfdsl.language.source import NESTING_LIMIT
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.language.syntax import (
    Call,
    Expression,
    Let,
    Listing,
    Number,
    Operation,
    Param,
    Path,
    Text,
    Word,
    paths_of,
)
from rlhfdsl.language.units import Quantity, Refusal, operate, read_number

TYPES = ("int", "float", "ratio", "bytes", "duration", "text", "switch", "symbol")
FUNCTIONS = ("min", "max", "ceil", "floor")

Found = Value | None  # None: a mistake was found and reported


@dataclass(frozen=True, slots=True)
class Given:
    """The value of a -p argument, in a source of its own."""

    value: Expression
    span: Span


class Evaluator:
    """Evaluates the expressions of one recipe; `problems` grows, `used` holds `param.x` and `let.x` read."""

    def __init__(
        self,
        params: Mapping[str, Param],
        given: Mapping[str, Given],
        problems: list[Diagnostic],
        complete: bool,
        lets: Mapping[str, Let] | None = None,
    ) -> None:
        self.params = params
        self.lets = lets or {}
        self.given = given
        self.problems = problems
        self.complete = complete
        self.used: set[str] = set()
        self._values: dict[str, Found] = {}
        self._open: list[str] = []

    def value(self, expression: Expression) -> Found:
        """The value, or None after the mistake in it was reported."""
        match expression:
            case Number(text=text, span=span):
                return self._keep(read_number(text), span)
            case Text(value=text):
                return text
            case Word(text=text):
                return Symbol(text)
            case Path():
                return self._path(expression)
            case Listing(items=items):
                values = [self.value(item) for item in items]
                return None if any(v is None for v in values) else tuple(v for v in values if v is not None)
            case Call():
                return self._call(expression)
            case Operation():
                return self._operation(expression)

    def behind(self, path: Path) -> Expression | None:
        """What a parameter or a `let` stands for: the -p argument, the default, the value."""
        if len(path.words) != 2:
            return None
        kind, key = (word.text for word in path.words)
        if kind == "let":
            return self.lets[key].value if key in self.lets else None
        if kind != "param":
            return None
        if key in self.given:
            return self.given[key].value
        return self.params[key].default if key in self.params else None

    def given_by(self, expression: Expression) -> str | None:
        """A parameter that a -p argument gives and that the expression reads, itself or through others."""
        todo, seen = [expression], set[str]()
        while todo:
            for path in paths_of(todo.pop()):
                if path.text in seen:
                    continue
                seen.add(path.text)
                if path.words[0].text == "param" and path.words[-1].text in self.given:
                    return path.words[-1].text
                behind = self.behind(path)
                todo += [behind] if behind is not None else []
        return None

    def literal(self, expression: Expression) -> Expression:
        """The expression that a lone parameter or `let` leads to, through others; else itself."""
        for _ in range(NESTING_LIMIT):
            behind = self.behind(expression) if isinstance(expression, Path) else None
            if behind is None:
                break
            expression = behind
        return expression

    def named(self, kind: str, key: str, span: Span) -> Found:
        """The value of `param.key`, in its type, or of `let.key`."""
        what = "parameter" if kind == "param" else "`let`"
        known: Mapping[str, Param | Let] = self.params if kind == "param" else self.lets
        entry = known.get(key)
        if entry is None:
            if self.complete:
                near = nearest(key, known)
                elsewhere = "let" if kind == "param" else "param"
                write = f"{key}: int = …" if kind == "param" else f"{key} = …"
                help = f"write `{kind} {write}` at the top level"
                if near:
                    help = f"did you mean {listed(f'{kind}.{n}' for n in near)}?"
                elif key in (self.lets if kind == "param" else self.params):
                    help = f"did you mean `{elsewhere}.{key}`?"
                self._report("E0501", f"there is no {what} `{key}`", span, help=help)
            return None
        name = f"{kind}.{key}"
        self.used.add(name)
        if name in self._open:
            circle = " -> ".join([*self._open[self._open.index(name) :], name])
            if name not in self._values:
                self._report("E0505", f"values need each other: {circle}", entry.name.span)
            self._values[name] = None
            return None
        if len(self._open) >= NESTING_LIMIT:
            self._report("E0902", f"values refer to each other more than {NESTING_LIMIT} deep", span)
            return None
        if name not in self._values:
            self._open.append(name)
            found = self._param(entry) if isinstance(entry, Param) else self.value(entry.value)
            self._open.pop()
            self._values.setdefault(name, found)
        return self._values[name]

    def _param(self, param: Param) -> Found:
        key = param.name.text
        wrong = [word for word in param.types if word.text not in TYPES]
        for word in wrong:
            near = nearest(word.text, TYPES)
            help = f"did you mean {listed(near)}?" if near else f"types: {', '.join(TYPES)}"
            self._report("E0507", f"there is no type `{word.text}`", word.span, help=help)
        given = self.given.get(key)
        if wrong or (given is None and param.default is None):
            if not wrong:
                help = f"give one: `-p {key}=…`, or write a default"
                self._report("E0502", f"the parameter `{key}` has no value", param.name.span, help=help)
            return None
        expression = given.value if given is not None else param.default
        assert expression is not None
        value = self.value(expression)
        if value is None:
            return None
        for word in param.types:
            fitted = _fit(word.text, value)
            if fitted is not None:
                return fitted
        types = " or ".join(word.text for word in param.types)
        label = Label(param.types[0].span, f"its type is {types}")
        message = f"the parameter `{key}` takes {types}, not {describe(value)}"
        self._report("E0506", message, expression.span, secondary=(label,))
        return None

    def _path(self, path: Path) -> Found:
        kind = path.words[0].text
        if kind not in ("param", "let"):
            return path
        if len(path.words) != 2:
            what = "parameter" if kind == "param" else "`let`"
            self._report("E0501", f"`{path.text}` names no {what}", path.span, help=f"write `{kind}.name`")
            return None
        return self.named(kind, path.words[1].text, path.words[1].span)

    def _operation(self, operation: Operation) -> Found:
        left = self.value(operation.left) if operation.left is not None else Quantity(Fraction(0))
        right = self.value(operation.right)
        if left is None or right is None:
            return None
        for value, side in ((left, operation.left), (right, operation.right)):
            if not isinstance(value, Quantity):
                assert side is not None
                message = f"`{operation.operator}` takes numbers, not {describe(value)}"
                self._report("E0314", message, side.span)
                return None
        assert isinstance(left, Quantity) and isinstance(right, Quantity)
        if operation.left is None:
            return Quantity(-right.value, right.unit)
        return self._keep(operate(operation.operator, left, right), operation.span)

    def _call(self, call: Call) -> Found:
        function = call.name.text
        if function not in FUNCTIONS:
            near = nearest(function, FUNCTIONS)
            help = f"did you mean {listed(near)}?" if near else f"functions: {', '.join(FUNCTIONS)}"
            self._report("E0313", f"there is no function `{function}`", call.name.span, help=help)
            return None
        values = [self.value(argument) for argument in call.arguments]
        if any(value is None for value in values):
            return None
        numbers = [value for value in values if isinstance(value, Quantity)]
        takes = "one number" if function in ("ceil", "floor") else "at least two numbers of one unit"
        fits = len(numbers) == 1 if function in ("ceil", "floor") else len(numbers) >= 2
        units = {"" if number.unit == "count" else number.unit for number in numbers}
        if not fits or len(numbers) != len(values) or len(units) > 1:
            self._report("E0313", f"`{function}` takes {takes}", call.span)
            return None
        if function == "ceil":
            return Quantity(Fraction(math.ceil(numbers[0].value)), numbers[0].unit)
        if function == "floor":
            return Quantity(Fraction(math.floor(numbers[0].value)), numbers[0].unit)
        return (min if function == "min" else max)(numbers, key=lambda number: number.value)

    def _keep(self, result: Quantity | Refusal, span: Span) -> Quantity | None:
        if isinstance(result, Quantity):
            return result
        self._report(result.code, result.message, span, help=result.help)
        return None

    def _report(
        self, code: str, message: str, span: Span, help: str | None = None, secondary: tuple[Label, ...] = ()
    ) -> None:
        self.problems.append(Diagnostic(code, "error", message, span, secondary=secondary, help=help))


def _fit(type_: str, value: Value) -> Value | None:
    """The value in a parameter's type, or None when it does not fit."""
    match type_, value:
        case "int", Quantity(unit="" | "count", whole=True):
            return value
        case "float", Quantity(unit="" | "count"):
            return value
        case "ratio", Quantity(unit="" | "ratio"):
            return Quantity(value.value, "ratio")
        case "bytes", Quantity(unit="bytes"):
            return value
        case "duration", Quantity(unit="duration"):
            return value
        case "text", str():
            return value
        case "switch", Symbol(text="on" | "off"):
            return value
        case "symbol", Symbol():
            return value
        case _:
            return None
