"""Collects what planning finds wrong, as diagnostics at the settings that decide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rlhfdsl.language.diagnostics import Diagnostic, Label
from rlhfdsl.language.recipe import Recipe


@dataclass(slots=True)
class Problems:
    """The diagnostics of one compilation, in the order found; one mistake is reported once."""

    recipe: Recipe
    found: list[Diagnostic] = field(default_factory=list)

    def report(
        self,
        code: str,
        message: str,
        at: str,
        *,
        label: str = "",
        also: Iterable[tuple[str, str]] = (),
        notes: Iterable[str] = (),
        help: str | None = None,
    ) -> None:
        """Add a diagnostic at the setting `at` (`stage.sft.batch`), with `also` as (address, text) labels."""
        secondary = []
        for address, text in also:
            span = self.recipe.span_of(address)
            if span is not None:
                secondary.append(Label(span, text))
        said = Diagnostic(
            code=code, severity="warning" if code.startswith("W") else "error", message=message,
            span=self.recipe.span_of(at), label=label, secondary=tuple(secondary), notes=tuple(notes),
            help=help,
        )  # fmt: skip
        if said not in self.found:
            self.found.append(said)

    @property
    def failed(self) -> bool:
        """Whether there is an error among them."""
        return any(d.severity == "error" for d in self.found)
