"""A file to a checked recipe: the order of the passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhfdsl.language.advice import ADVICE, secrets
from rlhfdsl.language.check import check
from rlhfdsl.language.diagnostics import Diagnostic, Label
from rlhfdsl.language.evaluate import Evaluator
from rlhfdsl.language.includes import include
from rlhfdsl.language.layers import copy_blocks
from rlhfdsl.language.link import link, order, unreached, unread
from rlhfdsl.language.parser import parse
from rlhfdsl.language.recipe import Block, Recipe
from rlhfdsl.language.rules import RULES, WHOLE
from rlhfdsl.language.settings import apply_profile, apply_sets, give_params
from rlhfdsl.language.source import Overlay, SourceFile, read
from rlhfdsl.language.syntax import Document, Let, Param


@dataclass(frozen=True, slots=True)
class Compilation:
    """What became of a file: the recipe (None after an error), what is said about it, and the sources.

    `document` is all that the files say, and `blocks` what could be made of it: for tools that work on broken
    recipes, as an editor does. `values` evaluates an expression of the recipe.
    """

    path: Path
    recipe: Recipe | None
    diagnostics: tuple[Diagnostic, ...]
    sources: Mapping[str, SourceFile]
    document: Document | None = None
    blocks: Mapping[str, Block] | None = None
    values: Evaluator | None = None


def load(
    path: str | Path,
    sets: Sequence[str] = (),
    params: Mapping[str, str] | None = None,
    profile: str | None = None,
    overlay: Overlay | None = None,
) -> Compilation:
    """Read, parse, evaluate, check and link a recipe; a writer's mistake is a diagnostic, never an exception.

    `sets` are `stage.ppo.kl.coef=0.05`, stronger than the file; `params` are values of its parameters;
    `profile` is one of its profiles. `overlay` gives the text of a file that an editor holds.
    """
    path = Path(path)
    source, problems = read(path, overlay)
    if source is None or problems:
        sources = {source.name: source} if source is not None else {}
        return Compilation(path, None, tuple(problems), sources)
    sources = {source.name: source}
    document, problems = parse(source)
    overridden = any(override.path.text == "recipe" for override in document.overrides)
    document = include(path, source, document, sources, problems, overlay)
    if document.misnested:
        return Compilation(path, None, tuple(sorted(problems, key=_place)), sources, document)
    document = copy_blocks(document, problems)
    written = document
    document, idle, wrong = apply_profile(document, profile)
    problems += wrong
    document, wrong = apply_sets(document, sets, sources)
    problems += wrong
    known, lets = _names(document, problems)
    given, wrong = give_params(params or {}, known, not document.lost, sources)
    problems += wrong
    evaluator = Evaluator(known, given, problems, not document.lost, lets)
    checked = check(document, evaluator, sources, problems, idle)
    used = set(evaluator.used)
    for name, param in known.items():
        if param.default is not None or name in given:
            evaluator.named("param", name, param.name.span)
    for name, let in lets.items():
        evaluator.named("let", name, let.name.span)
    blocks = link(checked.blocks, checked.named and not document.lost, checked.complete, problems)
    for rule in (*RULES, *ADVICE, *(WHOLE if checked.complete else ())):
        problems += rule(blocks)
    problems += secrets(sources)
    stages = order(blocks, problems)
    if checked.complete:
        problems += _whole(source, blocks, overridden)
    recipe = None
    if not any(problem.severity == "error" for problem in problems):
        problems += unreached(blocks, source.name)
        problems += unread(written, used, source.name)
        block = blocks["recipe"]
        recipe = Recipe(path, block.name or "", block, blocks, stages, sources)
    found = _once(sorted(problems, key=_place))
    return Compilation(path, recipe, found, sources, document, blocks, evaluator)


def _place(problem: Diagnostic) -> tuple[str, int, str]:
    return (problem.span.file, problem.span.start, problem.code) if problem.span else ("", 0, problem.code)


def _once(problems: Sequence[Diagnostic]) -> tuple[Diagnostic, ...]:
    """Each mistake once, also where copies of its block repeat it."""
    kept: dict[tuple[object, ...], Diagnostic] = {}
    for problem in problems:
        # What a block lacks is told at its header, where more than one such thing may be told.
        more = problem.help if problem.code == "E0305" else None
        key = (problem.code, problem.span, more) if problem.span is not None else (id(problem),)
        kept.setdefault(key, problem)
    return tuple(kept.values())


def _names(document: Document, problems: list[Diagnostic]) -> tuple[dict[str, Param], dict[str, Let]]:
    """The parameters and the `let`s by their names; the second of one name is reported."""
    params: dict[str, Param] = {}
    lets: dict[str, Let] = {}
    entries: list[Param | Let] = [*document.params, *document.lets]
    for entry in entries:
        first: Param | Let
        if isinstance(entry, Param):
            first = params.setdefault(entry.name.text, entry)
        else:
            first = lets.setdefault(entry.name.text, entry)
        if first is not entry:
            what = "parameters" if isinstance(entry, Param) else "`let`s"
            labels = (Label(first.name.span, "the first one"),)
            help = "give one of them another name"
            if isinstance(entry, Param) and first.name.span.file != entry.name.span.file:
                help = f"another default is given by `override param {{ {entry.name.text} = … }}`"
            message = f"there are two {what} `{entry.name.text}`"
            problems.append(
                Diagnostic("E0401", "error", message, entry.name.span, "the second one", labels, help=help)
            )
    return params, lets


def _whole(source: SourceFile, blocks: Mapping[str, Block], overridden: bool) -> list[Diagnostic]:
    """A recipe has a name and at least one stage.

    overridden: the file says `override recipe`, a mistake of its own that names what is missing as well.
    """
    problems = []
    if "recipe" not in blocks:
        if overridden:
            return []
        message = f"`{source.name}` has no `recipe` block"
        help = 'write `recipe "my-run" { language = 1 }` at its head'
        problems.append(Diagnostic("E0208", "error", message, help=help))
    elif not any(block.kind == "stage" for block in blocks.values()):
        message = "a recipe has at least one stage"
        help = "write for example `stage sft { … }`"
        problems.append(Diagnostic("E0209", "error", message, blocks["recipe"].span, help=help))
    return problems
