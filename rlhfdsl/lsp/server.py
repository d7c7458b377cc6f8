"""The server: what an editor asks, answered by the other modules of this folder."""

from __future__ import annotations

from typing import Protocol

from lsprotocol import types as lsp
from pygls.uris import from_fs_path
from pygls.workspace import TextDocument

from rlhfdsl.language import Edit, Span
from rlhfdsl.language.fixes import fix
from rlhfdsl.language.format import format_text
from rlhfdsl.language.parser import parse
from rlhfdsl.language.source import SourceFile
from rlhfdsl.lsp import derived
from rlhfdsl.lsp.complete import complete
from rlhfdsl.lsp.hover import hints, hover
from rlhfdsl.lsp.names import Project, Symbol
from rlhfdsl.lsp.session import Session, path_of

_KINDS = {
    "block": lsp.CompletionItemKind.Struct,
    "attribute": lsp.CompletionItemKind.Property,
    "symbol": lsp.CompletionItemKind.EnumMember,
    "reference": lsp.CompletionItemKind.Reference,
    "variable": lsp.CompletionItemKind.Variable,
    "keyword": lsp.CompletionItemKind.Keyword,
    "value": lsp.CompletionItemKind.Value,
}


server = Session()


class _Place(Protocol):
    """A question about a place of a text."""

    text_document: lsp.TextDocumentIdentifier
    position: lsp.Position


def _at(params: _Place) -> tuple[TextDocument, int]:
    document = server.workspace.get_text_document(params.text_document.uri)
    return document, document.offset_at_position(params.position)


@server.feature(lsp.TEXT_DOCUMENT_DID_OPEN)
@server.feature(lsp.TEXT_DOCUMENT_DID_CHANGE)
@server.feature(lsp.TEXT_DOCUMENT_DID_SAVE)
def changed(
    params: lsp.DidOpenTextDocumentParams | lsp.DidChangeTextDocumentParams | lsp.DidSaveTextDocumentParams,
) -> None:
    """Every open recipe anew: one may include another."""
    for uri in list(server.workspace.text_documents):
        server.publish(uri)


@server.feature(lsp.TEXT_DOCUMENT_DID_CLOSE)
def closed(params: lsp.DidCloseTextDocumentParams) -> None:
    """Take back what was said about a recipe."""
    for uri in server.published.pop(params.text_document.uri, set()):
        server.text_document_publish_diagnostics(lsp.PublishDiagnosticsParams(uri, []))


@server.feature(lsp.TEXT_DOCUMENT_FORMATTING)
def formatting(params: lsp.DocumentFormattingParams) -> list[lsp.TextEdit] | None:
    """The one form of the whole text; nothing while it has syntax errors."""
    document = server.workspace.get_text_document(params.text_document.uri)
    source = SourceFile(document.filename or "t", document.source)
    text, _ = format_text(source)
    if text is None or text == document.source:
        return None
    return [lsp.TextEdit(server.range(Span(source.name, 0, len(source.text)), source), text)]


@server.feature(lsp.TEXT_DOCUMENT_HOVER)
def hovering(params: lsp.HoverParams) -> lsp.Hover | None:
    """Doc, type, value and origin of what the cursor stands on."""
    document, offset = _at(params)
    path = path_of(document.uri)
    name = server.project(document.uri).at(path, offset)
    found = hover(document.source, offset, path.as_posix(), server.compile(document.uri), name)
    if found is None:
        return None
    text, span = found
    source = SourceFile(path.as_posix(), document.source)
    return lsp.Hover(lsp.MarkupContent(lsp.MarkupKind.Markdown, text), server.range(span, source))


@server.feature(lsp.TEXT_DOCUMENT_COMPLETION, lsp.CompletionOptions(trigger_characters=[".", "="]))
def completion(params: lsp.CompletionParams) -> lsp.CompletionList:
    """What can be written here."""
    document, offset = _at(params)
    prefix, items = complete(document.source, offset, server.compile(document.uri))
    source = SourceFile("t", document.source)
    place = server.range(Span("t", offset - len(prefix), offset), source)
    return lsp.CompletionList(
        is_incomplete=False,
        items=[
            lsp.CompletionItem(
                item.label,
                kind=_KINDS[item.kind],
                detail=item.detail or None,
                documentation=item.doc or None,
                filter_text=item.label,
                sort_text=f"{number:04}",
                insert_text_format=lsp.InsertTextFormat.Snippet,
                text_edit=lsp.TextEdit(place, item.insert),
            )
            for number, item in enumerate(items)
        ],
    )


def _symbol(uri: str, offset: int) -> tuple[Project, Symbol | None]:
    project = server.project(uri)
    name = project.at(path_of(uri), offset)
    return project, project.symbol(path_of(uri), name.address) if name is not None else None


@server.feature(lsp.TEXT_DOCUMENT_DEFINITION)
def definition(params: lsp.DefinitionParams) -> list[lsp.Location]:
    """Where the name under the cursor is given; for an include, its file."""
    document, offset = _at(params)
    project, symbol = _symbol(document.uri, offset)
    if symbol is None:
        included = project.include_at(path_of(document.uri), offset)
        start = lsp.Range(lsp.Position(0, 0), lsp.Position(0, 0))
        return [lsp.Location(from_fs_path(str(included)) or "", start)] if included is not None else []
    return _locations(project, symbol, lambda given: given)


@server.feature(lsp.TEXT_DOCUMENT_REFERENCES)
def references(params: lsp.ReferenceParams) -> list[lsp.Location]:
    """Every place of the name under the cursor, in all recipes of the workspace."""
    document, offset = _at(params)
    project, symbol = _symbol(document.uri, offset)
    own = params.context.include_declaration
    return _locations(project, symbol, lambda given: own or not given) if symbol is not None else []


def _locations(project: Project, symbol: Symbol, wanted: object) -> list[lsp.Location]:
    assert callable(wanted)
    return [
        lsp.Location(from_fs_path(str(file.path)) or "", server.range(name.span, file.source))
        for file, name in project.places(symbol)
        if wanted(name.given)
    ]


@server.feature(lsp.TEXT_DOCUMENT_PREPARE_RENAME)
def prepare_rename(params: lsp.PrepareRenameParams) -> lsp.PrepareRenamePlaceholder | None:
    """The name that would be changed."""
    document, offset = _at(params)
    project, symbol = _symbol(document.uri, offset)
    name = project.at(path_of(document.uri), offset)
    if symbol is None or name is None:
        return None
    source = SourceFile("t", document.source)
    return lsp.PrepareRenamePlaceholder(server.range(name.span, source), symbol[1].partition(".")[2])


@server.feature(lsp.TEXT_DOCUMENT_RENAME, lsp.RenameOptions(prepare_provider=True))
def rename(params: lsp.RenameParams) -> lsp.WorkspaceEdit | None:
    """A block, parameter or `let` under another name, in all recipes of the workspace."""
    document, offset = _at(params)
    project, symbol = _symbol(document.uri, offset)
    if symbol is None or not (params.new_name.isascii() and params.new_name.isidentifier()):
        return None
    if project.taken(symbol, params.new_name):
        return None
    changes: dict[str, list[lsp.TextEdit]] = {}
    for file, edit in project.rename(symbol, params.new_name):
        uri = from_fs_path(str(file.path)) or ""
        changes.setdefault(uri, []).append(lsp.TextEdit(server.range(edit.span, file.source), edit.text))
    return lsp.WorkspaceEdit(changes=changes)


@server.feature(
    lsp.TEXT_DOCUMENT_CODE_ACTION,
    lsp.CodeActionOptions([lsp.CodeActionKind.QuickFix, lsp.CodeActionKind.SourceFixAll]),
)
def code_actions(params: lsp.CodeActionParams) -> list[lsp.CodeAction]:
    """The fixes of the diagnostics in a range, and all that have one way out."""
    document = server.workspace.get_text_document(params.text_document.uri)
    path = path_of(document.uri)
    compilation = server.compile(document.uri)
    source = compilation.sources.get(path.as_posix())
    if source is None:
        return []
    actions = []
    for one in compilation.diagnostics:
        if one.span is None or one.span.file != source.name or not _meet(server.range(one.span, source), params.range):
            continue
        for mend in one.fixes:
            actions.append(
                lsp.CodeAction(
                    mend.title,
                    kind=lsp.CodeActionKind.QuickFix,
                    diagnostics=[server.diagnostic(one, compilation)],
                    is_preferred=len(one.fixes) == 1,
                    edit=_edit(document.uri, list(mend.edits), source),
                )
            )
    if any(len(one.fixes) == 1 for one in compilation.diagnostics):
        text, mended, _ = fix(path, overlay=server.overlay)
        if text is not None:
            whole = Edit(Span(source.name, 0, len(source.text)), text)
            title = f"mend all that has one way out ({len(mended)})"
            edit = _edit(document.uri, [whole], source)
            actions.append(lsp.CodeAction(title, kind=lsp.CodeActionKind.SourceFixAll, edit=edit))
    return actions


def _meet(one: lsp.Range, other: lsp.Range) -> bool:
    return one.start <= other.end and other.start <= one.end


def _edit(uri: str, edits: list[Edit], source: SourceFile) -> lsp.WorkspaceEdit:
    texts = [lsp.TextEdit(server.range(edit.span, source), edit.text) for edit in edits]
    return lsp.WorkspaceEdit(changes={uri: texts})


@server.feature(lsp.TEXT_DOCUMENT_INLAY_HINT)
def inlay_hints(params: lsp.InlayHintParams) -> list[lsp.InlayHint]:
    """What calculations come to, and how batches split over the GPUs of the recipe's cluster."""
    document = server.workspace.get_text_document(params.text_document.uri)
    file = path_of(document.uri).as_posix()
    source = SourceFile(file, document.source)
    found = []
    compilation = server.compile(document.uri)
    for offset, text in [*hints(file, compilation), *derived.batches(file, compilation)]:
        place = server.range(Span(file, offset, offset), source).start
        if params.range.start <= place <= params.range.end:
            found.append(lsp.InlayHint(place, text, kind=lsp.InlayHintKind.Type))
    return found


@server.feature(lsp.TEXT_DOCUMENT_DOCUMENT_SYMBOL)
def symbols(params: lsp.DocumentSymbolParams) -> list[lsp.DocumentSymbol]:
    """The outline: blocks, parameters, `let`s and profiles."""
    document = server.workspace.get_text_document(params.text_document.uri)
    source = SourceFile("t", document.source)
    tree, _ = parse(source)
    entries = [(source.slice(block.header), block.span, block.header, lsp.SymbolKind.Struct) for block in tree.blocks]
    entries += [(f"param {p.name.text}", p.span, p.name.span, lsp.SymbolKind.Variable) for p in tree.params]
    entries += [(f"let {x.name.text}", x.span, x.name.span, lsp.SymbolKind.Constant) for x in tree.lets]
    entries += [(f"profile {p.name.text}", p.span, p.name.span, lsp.SymbolKind.Namespace) for p in tree.profiles]
    entries += [(f"override {o.path.text}", o.span, o.path.span, lsp.SymbolKind.Struct) for o in tree.overrides]
    return [
        lsp.DocumentSymbol(name, kind, server.range(span, source), server.range(head, source))
        for name, span, head, kind in sorted(entries, key=lambda entry: entry[1])
    ]
