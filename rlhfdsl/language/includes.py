"""`extends` and `import`: the files that a recipe includes, and one document of them all."""

from __future__ import annotations

import posixpath
from dataclasses import replace
from pathlib import Path

from rlhfdsl.language import layers, namespaces
from rlhfdsl.language.diagnostics import Diagnostic, Label, Span
from rlhfdsl.language.parser import parse
from rlhfdsl.language.source import Overlay, SourceFile, read
from rlhfdsl.language.syntax import Document, Include, address_of

FILE_LIMIT = 64
DEPTH_LIMIT = 16
# What an import offers; its recipe, cluster, stages and profiles are its own.
_OFFERED = ("model", "data", "blend", "parallel", "scorer")
_PROJECT = (".git", ".hg", "pyproject.toml")


def project_of(path: Path) -> Path:
    """The folder that the files of a recipe lie in: the repository's, else the recipe's own."""
    folder = path.resolve().parent
    marked = (parent for parent in (folder, *folder.parents) if any((parent / m).exists() for m in _PROJECT))
    return next(marked, folder)


def include(
    path: Path,
    source: SourceFile,
    document: Document,
    sources: dict[str, SourceFile],
    problems: list[Diagnostic],
    overlay: Overlay | None = None,
) -> Document:
    """The root document with all that it includes; the texts go to `sources`."""
    if not document.includes and not document.overrides:
        return document
    return _Files(path, sources, problems, overlay).resolve(source, document, [path.resolve()])


class _Files:
    def __init__(
        self, root: Path, sources: dict[str, SourceFile], problems: list[Diagnostic], overlay: Overlay | None
    ) -> None:
        self.root = root
        self.project: Path | None = None
        self.sources = sources
        self.problems = problems
        self.overlay = overlay
        self.count = 1

    def report(self, code: str, message: str, span: Span, help: str | None = None, *labels: Label) -> None:
        self.problems.append(Diagnostic(code, "error", message, span, secondary=labels, help=help))

    def resolve(self, source: SourceFile, document: Document, chain: list[Path]) -> Document:
        """A file's document with its includes in it, and its overrides carried out."""
        names = [include.name.text for include in document.includes if include.name is not None]
        document = namespaces.join(document, names)
        included: dict[str, Span] = {}
        base: Include | None = None
        seen: dict[str, Include] = {}
        whole = document
        for entry in document.includes:
            first = base if entry.name is None else seen.get(entry.name.text)
            if first is not None:
                what = "`extends` one other file at most" if entry.name is None else "gives each import a name"
                label = Label(first.span, "the first one")
                self.report("E0404", f"a file {what}", entry.span, "keep one of them", label)
                continue
            base = entry if entry.name is None else base
            if entry.name is not None:
                seen[entry.name.text] = entry
            other = self.open(source, entry, chain)
            if other is None:
                whole = replace(whole, broken=True, lost=True)
                continue
            if entry.name is None:
                other = layers.relayer(other, "base")
                whole = layers.extend(other, whole)
            else:
                offered = tuple(block for block in other.blocks if block.kind.text in _OFFERED)
                other = namespaces.prefix(replace(other, blocks=offered, profiles=()), entry.name.text)
                whole = layers.join(other, whole)
            included |= {
                address_of(block): block.header for block in other.blocks if block.kind.text != "recipe"
            }
            included |= {f"param.{param.name.text}": param.name.span for param in other.params}
        return replace(layers.apply_overrides(whole, included, self.problems), includes=())

    def open(self, source: SourceFile, entry: Include, chain: list[Path]) -> Document | None:
        """The document of an included file, resolved; None after its mistake was reported."""
        text, span = entry.path.value, entry.path.span
        if text.startswith(("/", "~", "\\")) or "\0" in text or not text.endswith(".rlhf"):
            help = "write a path to a .rlhf file, relative to this one"
            self.report("E0211", f"`{text}` cannot be included", span, help)
            return None
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source.name), text))
        path = Path(name)
        resolved = path.resolve()
        self.project = self.project or project_of(self.root)
        if not resolved.is_relative_to(self.project):
            help = f"the project is the repository, or without one the recipe's folder: {self.project.name}/"
            self.report("E0211", f"`{text}` lies outside the project", span, help)
            return None
        if resolved in chain:
            circle = " -> ".join(p.name for p in [*chain[chain.index(resolved) :], resolved])
            self.report("E0212", f"files include each other: {circle}", span)
            return None
        self.count += 1
        if self.count > FILE_LIMIT or len(chain) >= DEPTH_LIMIT:
            limit = f"{FILE_LIMIT} files" if self.count > FILE_LIMIT else f"{DEPTH_LIMIT} files inside each other"
            self.report("E0904", f"a recipe includes at most {limit}", span)
            return None
        folder = posixpath.normpath(posixpath.join(source.folder, posixpath.dirname(text)))
        included, problems = read(path, self.overlay, "" if folder == "." else folder)
        self.problems += [replace(p, span=span) if p.span is None else p for p in problems]
        if included is None:
            return None
        self.sources[included.name] = included
        if problems:
            return None
        document, problems = parse(included)
        self.problems += problems
        return self.resolve(included, document, [*chain, resolved])
