"""A file to a checked recipe: the order of the passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhfdsl.language.check import check
from rlhfdsl.language.diagnostics import Diagnostic, Label
from rlhfdsl.language.evaluate import Evaluator
from rlhfdsl.language.link import link, order, unreached
from rlhfdsl.language.parser import parse
from rlhfdsl.language.recipe import Block, Recipe
from rlhfdsl.language.rules import RULES, WHOLE
from rlhfdsl.language.settings import apply_sets, give_params
from rlhfdsl.language.source import SourceFile, read
from rlhfdsl.language.syntax import Document, Param


@dataclass(frozen=True, slots=True)
class Compilation:
    """What became of a file: the recipe (None after an error), what is said about it, and the sources."""

    path: Path
    recipe: Recipe | None
    diagnostics: tuple[Diagnostic, ...]
    sources: Mapping[str, SourceFile]


def load(path: str | Path, sets: Sequence[str] = (), params: Mapping[str, str] | None = None) -> Compilation:
    """Read, parse, evaluate, check and link a recipe; a writer's mistake is a diagnostic, never an exception.

    `sets` are `stage.ppo.kl.coef=0.05`, stronger than the file; `params` are values of its parameters.
    """
    path = Path(path)
    source, problems = read(path)
    if source is None or problems:
        sources = {source.name: source} if source is not None else {}
        return Compilation(path, None, tuple(problems), sources)
    sources = {source.name: source}
    document, problems = parse(source)
    if document.misnested:
        return Compilation(path, None, tuple(sorted(problems, key=_place)), sources)
    known, twins = _params(document)
    problems += twins
    document, wrong = apply_sets(document, sets, sources)
    problems += wrong
    given, wrong = give_params(params or {}, known, not document.broken, sources)
    problems += wrong
    evaluator = Evaluator(known, given, problems, not document.broken)
    checked = check(document, evaluator, sources, problems)
    for param in known.values():
        if param.default is not None or param.name.text in given:
            used = set(evaluator.used)
            evaluator.param(param.name.text, param.name.span)
            evaluator.used = used
    blocks = link(checked.blocks, checked.complete, problems)
    for rule in (*RULES, *(WHOLE if checked.complete else ())):
        problems += rule(blocks)
    stages = order(blocks, problems)
    if checked.complete:
        problems += _whole(source, blocks)
    if not any(problem.severity == "error" for problem in problems):
        problems += unreached(blocks)
        problems += _unused(known, evaluator)
    recipe = None
    if not any(problem.severity == "error" for problem in problems):
        block = blocks["recipe"]
        recipe = Recipe(path, block.name or "", block, blocks, stages, sources)
    return Compilation(path, recipe, tuple(sorted(problems, key=_place)), sources)


def _place(problem: Diagnostic) -> tuple[str, int, str]:
    return (problem.span.file, problem.span.start, problem.code) if problem.span else ("", 0, problem.code)


def _params(document: Document) -> tuple[dict[str, Param], list[Diagnostic]]:
    known: dict[str, Param] = {}
    problems = []
    for param in document.params:
        first = known.setdefault(param.name.text, param)
        if first is not param:
            message = f"there are two parameters `{param.name.text}`"
            labels = (Label(first.name.span, "the first one"),)
            problems.append(Diagnostic("E0401", "error", message, param.name.span, "the second one", labels))
    return known, problems


def _whole(source: SourceFile, blocks: Mapping[str, Block]) -> list[Diagnostic]:
    """A recipe has a name and at least one stage."""
    problems = []
    if "recipe" not in blocks:
        message = f"`{source.name}` has no `recipe` block"
        help = 'write `recipe "my-run" { language = 1 }` at its head'
        problems.append(Diagnostic("E0208", "error", message, help=help))
    elif not any(block.kind == "stage" for block in blocks.values()):
        message = "a recipe has at least one stage"
        help = "write for example `stage sft { … }`"
        problems.append(Diagnostic("E0209", "error", message, blocks["recipe"].span, help=help))
    return problems


def _unused(known: Mapping[str, Param], evaluator: Evaluator) -> list[Diagnostic]:
    return [
        Diagnostic(
            "W0201", "warning", f"nothing reads `param.{name}`", param.name.span, help="delete it, or use it"
        )
        for name, param in known.items()
        if name not in evaluator.used
    ]
