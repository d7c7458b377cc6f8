"""What is said about a recipe: codes, spans, labels, notes, help, fixes; values, never raised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A piece of a source, in code points; `end` is the first one after it."""

    file: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Label:
    """A second place that a message shows, with a short text."""

    span: Span
    text: str


@dataclass(frozen=True, slots=True)
class Edit:
    """Put `text` in place of a span."""

    span: Span
    text: str


@dataclass(frozen=True, slots=True)
class Fix:
    """A change that mends a mistake, as a sentence and as edits.

    A diagnostic with one fix is mended by `rlhf fix`; of several, only the writer knows which is meant.
    """

    title: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One message. `message` stands on its own, without a final period; `label` stands under the span."""

    code: str
    severity: Severity
    message: str
    span: Span | None = None
    label: str = ""
    secondary: tuple[Label, ...] = ()
    notes: tuple[str, ...] = ()
    help: str | None = None
    fixes: tuple[Fix, ...] = ()


class Locates(Protocol):
    """Anything that knows the place of an address: a Recipe."""

    def span_of(self, address: str) -> Span | None:
        """The place of a setting or a block."""


class UserError(Exception):
    """Something that the user can mend, found after the recipe was compiled: in data, models, engines.

    `at` is a recipe address (`data.own.from`), `place` a place in another file (`data/own.jsonl:17`).
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        at: str | None = None,
        place: str | None = None,
        help: str | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.at = at
        self.place = place
        self.help = help
        if help is not None:
            self.add_note(f"help: {help}")  # where nobody renders it, below its traceback

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}" + (f" ({self.place})" if self.place else "")

    def diagnostic(self, recipe: Locates | None) -> Diagnostic:
        """The same as a Diagnostic: with the span of the setting at `at` when the recipe has it."""
        span = recipe.span_of(self.at) if recipe is not None and self.at else None
        notes = [f"at {self.at}"] if self.at and span is None else []
        notes += [f"in {self.place}"] if self.place else []
        return Diagnostic(self.code, "error", self.message, span, notes=tuple(notes), help=self.help)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters, for a message or its help."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
