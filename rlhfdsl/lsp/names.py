"""Names in a project's files: where each is given and read, for definition, references and rename."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlhfdsl.language import namespaces, schema
from rlhfdsl.language.diagnostics import Edit, Span
from rlhfdsl.language.parser import parse
from rlhfdsl.language.source import SourceFile, read
from rlhfdsl.language.syntax import (
    Attribute,
    BlockSyntax,
    Document,
    Member,
    Word,
    address_of,
    paths_of,
)
from rlhfdsl.language.syntax import Path as Dotted

_FILES = 256


@dataclass(frozen=True, slots=True)
class Name:
    """A place where an address stands, as its file writes it. `span` is of its last word.

    given: whether it is the place that gives it. bare: a stage without a name, whose kind stands for it.
    """

    address: str
    span: Span
    given: bool = False
    bare: bool = False


@dataclass(slots=True)
class File:
    """A file of the project, parsed."""

    path: Path
    source: SourceFile
    document: Document
    names: list[Name] = field(default_factory=list)


Symbol = tuple[Path, str]  # the file that gives a name, and its address there


class Project:
    """The recipes of some folders and what they include; `overlay` gives the texts that an editor holds."""

    def __init__(self, roots: list[Path], overlay: Callable[[Path], str | None]) -> None:
        self.overlay = overlay
        self.files: dict[Path, File] = {}
        paths = [path for root in roots for path in ([root] if root.is_file() else sorted(root.rglob("*.rlhf")))]
        for path in paths[:_FILES]:
            self.file(path)

    def file(self, path: Path) -> File | None:
        """A file, parsed when it is first asked for; None when it cannot be read."""
        path = path.resolve()
        if path not in self.files:
            source, problems = read(path, self.overlay)
            if source is None or problems:
                return None
            document, _ = parse(source)
            imports = [entry.name.text for entry in document.includes if entry.name is not None]
            joined = namespaces.join(document, imports)
            self.files[path] = File(path, source, document, list(_names(joined)))
        return self.files[path]

    def at(self, path: Path, offset: int) -> Name | None:
        """The name that a cursor stands on."""
        file = self.file(path)
        names = file.names if file is not None else []
        return next((name for name in names if name.span.start <= offset <= name.span.end), None)

    def include_at(self, path: Path, offset: int) -> Path | None:
        """The file that `extends` or `import` under a cursor names."""
        file = self.file(path)
        for entry in file.document.includes if file is not None else ():
            if entry.path.span.start <= offset <= entry.path.span.end:
                other = self.file(path.parent / entry.path.value)
                return other.path if other is not None else None
        return None

    def symbol(self, path: Path, address: str, seen: frozenset[Path] = frozenset()) -> Symbol | None:
        """Which file gives an address that a file reads: itself, the import named in it, or its base."""
        file = self.file(path)
        if file is None or file.path in seen:
            return None
        if any(name.given and name.address == address for name in file.names):
            return file.path, address
        kind, _, name = address.partition(".")
        namespace, dot, rest = name.partition(".")
        for entry in file.document.includes:
            other = file.path.parent / posixpath.normpath(entry.path.value)
            if entry.name is not None and dot and entry.name.text == namespace:
                return self.symbol(other, f"{kind}.{rest}", seen | {file.path})
            if entry.name is None:
                found = self.symbol(other, address, seen | {file.path})
                if found is not None:
                    return found
        return None

    def places(self, symbol: Symbol) -> list[tuple[File, Name]]:
        """Every place of a symbol in all files."""
        return [
            (file, name)
            for file in list(self.files.values())
            for name in file.names
            if name.address.rpartition(".")[2] == symbol[1].rpartition(".")[2]
            and self.symbol(file.path, name.address) == symbol
        ]

    def rename(self, symbol: Symbol, to: str) -> list[tuple[File, Edit]]:
        """The edits that give a symbol another name; a stage without a name gets one."""
        edits = []
        for file, name in self.places(symbol):
            if name.bare:
                at = Span(name.span.file, name.span.end, name.span.end)
                edits.append((file, Edit(at, f" {to}")))
            else:
                edits.append((file, Edit(name.span, to)))
        return edits

    def taken(self, symbol: Symbol, to: str) -> bool:
        """Whether the file that gives a symbol has another one of the new name."""
        kind = symbol[1].partition(".")[0]
        return any(name.given and name.address == f"{kind}.{to}" for name in self.files[symbol[0]].names)


def _names(document: Document) -> Iterator[Name]:
    for block in document.blocks:
        labels = [label for label in block.labels if isinstance(label, Word)]
        if labels and block.kind.text in schema.kinds():
            bare = block.kind.text == "stage" and len(labels) == 1
            yield Name(address_of(block), labels[-1].span, given=True, bare=bare)
        if block.copied is not None:
            yield from _path(block.copied)
        yield from _members(block.members, block.kind.text)
    for param in document.params:
        yield Name(f"param.{param.name.text}", param.name.span, given=True)
        for path in paths_of(param.default) if param.default is not None else ():
            yield from _path(path)
    for let in document.lets:
        yield Name(f"let.{let.name.text}", let.name.span, given=True)
        for path in paths_of(let.value):
            yield from _path(path)
    for profile in document.profiles:
        for setting in profile.settings:
            yield from _path(setting.path)
            for path in paths_of(setting.value):
                yield from _path(path)
    for override in document.overrides:
        yield from _path(override.path)
        if override.path.text == "param":
            for member in override.members:
                if isinstance(member, Attribute):
                    yield _name("param", member.path.words[0])
        yield from _members(override.members, override.path.words[-1].text)


def _members(members: tuple[Member, ...], inside: str) -> Iterator[Name]:
    for member in members:
        if isinstance(member, BlockSyntax):
            yield from _members(member.members, member.kind.text)
            continue
        if inside in schema.naming() and len(member.path.words) == 1:
            yield _name(schema.naming()[inside], member.path.words[0])
        for path in paths_of(member.value):
            yield from _path(path)


def _path(path: Dotted) -> Iterator[Name]:
    if len(path.words) > 1 and path.words[0].text in (*schema.kinds(), "param", "let"):
        yield _name(path.words[0].text, path.words[1])


def _name(kind: str, word: Word) -> Name:
    last = len(word.text.rpartition(".")[2])
    return Name(f"{kind}.{word.text}", Span(word.span.file, word.span.end - last, word.span.end))
