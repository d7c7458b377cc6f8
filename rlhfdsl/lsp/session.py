"""One editor's session: its open texts, compiled when they are asked about, and what was said of them."""

from __future__ import annotations

from pathlib import Path

from lsprotocol import types as lsp
from pygls.lsp.server import LanguageServer
from pygls.uris import from_fs_path, to_fs_path

from rlhfdsl import __version__
from rlhfdsl.language import Compilation, Diagnostic, Span, load
from rlhfdsl.language.source import SourceFile
from rlhfdsl.lsp.names import Project


class Session(LanguageServer):
    """Compiles a recipe when it is asked about; the texts are those that the editor holds."""

    def __init__(self) -> None:
        super().__init__("rlhf", __version__)
        self.published: dict[str, set[str]] = {}

    def overlay(self, path: Path) -> str | None:
        """The text of a file that is open."""
        resolved = path.resolve()
        for document in self.workspace.text_documents.values():
            if path_of(document.uri) == resolved:
                text: str = document.source
                return text
        return None

    def compile(self, uri: str) -> Compilation:
        """The compilation of an open recipe."""
        return load(path_of(uri), overlay=self.overlay)

    def project(self, uri: str) -> Project:
        """The recipes of the workspace, or of the recipe's folder."""
        folders = [path_of(folder.uri) for folder in self.workspace.folders.values()]
        own = path_of(uri)
        project = Project(folders or [own.parent], self.overlay)
        project.file(own)
        return project

    def range(self, span: Span, source: SourceFile) -> lsp.Range:
        """A span in the units that the editor counts in."""
        (line, column), (end_line, end_column) = source.position(span.start), source.position(span.end)
        whole = lsp.Range(lsp.Position(line - 1, column - 1), lsp.Position(end_line - 1, end_column - 1))
        codec = self.workspace.position_codec
        return codec.range_to_client_units(source.text.splitlines(keepends=True), whole)

    def publish(self, uri: str) -> None:
        """The diagnostics of a recipe, at it and at the files that it includes and that are not open."""
        compilation = self.compile(uri)
        own = path_of(uri).as_posix()
        found: dict[str, list[lsp.Diagnostic]] = {uri: []}
        document = compilation.document
        library = document is not None and not any(block.kind.text == "recipe" for block in document.blocks)
        for diagnostic in compilation.diagnostics:
            if library and diagnostic.code == "E0208":
                continue  # a file to import has no `recipe` block
            file = diagnostic.span.file if diagnostic.span is not None else own
            at = uri if file == own else from_fs_path(str(Path(file).resolve())) or uri
            if at == uri or self.overlay(Path(file)) is None:
                found.setdefault(at, []).append(self.diagnostic(diagnostic, compilation))
        for gone in self.published.get(uri, set()) - found.keys():
            found[gone] = []
        self.published[uri] = set(found)
        for at, diagnostics in found.items():
            self.text_document_publish_diagnostics(lsp.PublishDiagnosticsParams(at, diagnostics))

    def diagnostic(self, one: Diagnostic, compilation: Compilation) -> lsp.Diagnostic:
        """A diagnostic as the protocol has it."""
        start = lsp.Range(lsp.Position(0, 0), lsp.Position(0, 0))
        at = self.range(one.span, compilation.sources[one.span.file]) if one.span is not None else start
        text = "\n".join([one.message, *one.notes, *([f"help: {one.help}"] if one.help else [])])
        related = [
            lsp.DiagnosticRelatedInformation(
                lsp.Location(
                    from_fs_path(str(Path(label.span.file).resolve())) or "",
                    self.range(label.span, compilation.sources[label.span.file]),
                ),
                label.text or "here",
            )
            for label in one.secondary
            if label.span.file in compilation.sources
        ]
        severity = lsp.DiagnosticSeverity.Error if one.severity == "error" else lsp.DiagnosticSeverity.Warning
        return lsp.Diagnostic(
            at, text, severity=severity, code=one.code, source="rlhf", related_information=related or None
        )


def path_of(uri: str) -> Path:
    """The file of a URI; for a text that has none yet, a name beside nothing."""
    return Path(to_fs_path(uri) or uri.rpartition("/")[2] or "untitled.rlhf").resolve()
