"""The language server as an editor meets it: the real process, over the protocol."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lsprotocol import types as lsp
from pygls.uris import from_fs_path

pytest_lsp = pytest.importorskip("pytest_lsp")

TEXT = """\
extends "base.rlhf"
recipe "t" { }
param size: int = 4
let batch = 16 * param.size
model other { from = "./ä/🐢", dtype = bf16 } # 🐢
stage sft again from stage.sft {
  model = model.other
  batch = let.batch
  learning_rate = 1e-3
}
"""
PARTS = Path(__file__).parents[1] / "corpus" / "parts"


@pytest_lsp.fixture(config=pytest_lsp.ClientServerConfig(server_command=[sys.executable, "-m", "rlhfdsl", "lsp"]))
async def client(lsp_client: pytest_lsp.LanguageClient, tmp_path):
    (tmp_path / "base.rlhf").write_text((PARTS / "base.rlhf").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "t.rlhf").write_text(TEXT, encoding="utf-8")
    lsp_client.folder = tmp_path
    folder = lsp.WorkspaceFolder(from_fs_path(str(tmp_path)), "t")
    params = lsp.InitializeParams(
        capabilities=pytest_lsp.client_capabilities("visual-studio-code"), workspace_folders=[folder]
    )
    lsp_client.answer = await lsp_client.initialize_session(params)
    yield
    await lsp_client.shutdown_session()


class Editor:
    """One open recipe; places are found by a piece of its text."""

    def __init__(self, client, text: str = TEXT, name: str = "t.rlhf") -> None:
        self.client, self.text = client, text
        self.uri = from_fs_path(str((client.folder / name).resolve()))
        self.id = lsp.TextDocumentIdentifier(self.uri)

    async def open(self) -> list[lsp.Diagnostic]:
        item = lsp.TextDocumentItem(self.uri, "rlhf", 1, self.text)
        self.client.text_document_did_open(lsp.DidOpenTextDocumentParams(item))
        await self.client.wait_for_notification(lsp.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)
        return self.client.diagnostics[self.uri]

    async def change(self, text: str) -> list[lsp.Diagnostic]:
        self.text = text
        version = lsp.VersionedTextDocumentIdentifier(version=2, uri=self.uri)
        whole = lsp.TextDocumentContentChangeWholeDocument(text)
        self.client.text_document_did_change(lsp.DidChangeTextDocumentParams(version, [whole]))
        await self.client.wait_for_notification(lsp.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)
        return self.client.diagnostics[self.uri]

    def at(self, piece: str, more: int = 0) -> lsp.Position:
        """UTF-16 position of a piece of the text."""
        offset = self.text.index(piece) + more
        line = self.text.count("\n", 0, offset)
        start = self.text.rfind("\n", 0, offset) + 1
        return lsp.Position(line, len(self.text[start:offset].encode("utf-16-le")) // 2)

    def applied(self, edits: list[lsp.TextEdit]) -> str:
        text = self.text
        for edit in sorted(edits, key=lambda e: e.range.start, reverse=True):
            start, end = (self.offset(place) for place in (edit.range.start, edit.range.end))
            text = text[:start] + edit.new_text + text[end:]
        return text

    def offset(self, place: lsp.Position) -> int:
        lines = self.text.splitlines(keepends=True)
        line = lines[place.line] if place.line < len(lines) else ""
        inside = line.encode("utf-16-le")[: 2 * place.character].decode("utf-16-le")
        return sum(map(len, lines[: place.line])) + len(inside)


@pytest.mark.asyncio
async def test_diagnostics_come_and_go(client):
    editor = Editor(client)
    (one,) = await editor.open()
    assert (one.code, one.source, one.range.start) == ("E0301", "rlhf", editor.at("learning_rate"))
    assert "`lr` here" in one.message
    assert list(await editor.change(TEXT.replace("learning_rate", "lr"))) == []
    wrong = await editor.change(TEXT.replace("dtype = bf16", "dtype = bf17").replace("learning_rate", "lr"))
    (one,) = wrong
    assert one.range.start == editor.at("bf17") and one.range.end == editor.at("bf17", 4)


@pytest.mark.asyncio
async def test_a_file_to_import_needs_no_recipe_block(client):
    editor = Editor(client, 'model a { from = "x/y" }\n', "models.rlhf")
    assert list(await editor.open()) == []


@pytest.mark.asyncio
async def test_formatting(client):
    editor = Editor(client)
    await editor.open()
    options = lsp.FormattingOptions(tab_size=2, insert_spaces=True)
    edits = await client.text_document_formatting_async(lsp.DocumentFormattingParams(editor.id, options))
    text = editor.applied(edits)
    assert "  model         = model.other\n" in text and "}  # 🐢\n" in text
    await editor.change(text)
    assert await client.text_document_formatting_async(lsp.DocumentFormattingParams(editor.id, options)) is None


@pytest.mark.asyncio
async def test_hover(client):
    editor = Editor(client)
    await editor.open()
    for piece, more, parts in (
        ("dtype", 1, ["**dtype** = `bf16`", "takes one of bf16", "becomes `bf16.enabled`"]),
        ("let.batch", 5, ["**let.batch** = `64`", "16 * param.size"]),
        ("model.other", 7, ["**model.other**", 'from = "./ä/🐢"']),
        ("batch = let", 1, ["**batch** = `64`", "base", "reads `let.batch` = `64`"]),
        ("sft again", 1, ["**stage sft**"]),
        ("model other", 1, ["**model**", "language model"]),
        ("# 🐢", 1, []),
    ):
        found = await client.text_document_hover_async(lsp.HoverParams(editor.id, editor.at(piece, more)))
        assert all(part in found.contents.value for part in parts) if parts else found is None, piece


@pytest.mark.asyncio
async def test_completion(client):
    editor = Editor(client)
    await editor.open()

    async def items(text: str) -> dict[str, lsp.CompletionItem]:
        await editor.change(TEXT.replace("  learning_rate = 1e-3", text))
        place = editor.at("let.batch\n" + text, len("let.batch\n" + text))
        found = await client.text_document_completion_async(lsp.CompletionParams(editor.id, place))
        return {item.label: item for item in found.items}

    names = await items("  ")
    assert "lr" in names and "epochs" in names and "model" not in names and "batch" not in names
    assert names["warmup"].documentation.startswith("linear warm-up")
    values = await items("  schedule = co")
    assert {"cosine", "constant"} <= values.keys() and values["cosine"].text_edit.new_text == "cosine"
    assert values["cosine"].text_edit.range.start.character == 13
    references = await items("  data = blend.")
    assert {"blend.all", "blend.all.eval", "data.rows"} <= references.keys()
    assert "model.other" not in references


@pytest.mark.asyncio
async def test_definition_and_references(client):
    editor = Editor(client)
    await editor.open()
    found = await client.text_document_definition_async(lsp.DefinitionParams(editor.id, editor.at("model.other", 8)))
    assert [(place.uri, place.range.start) for place in found] == [(editor.uri, editor.at("other {"))]
    found = await client.text_document_definition_async(lsp.DefinitionParams(editor.id, editor.at("stage.sft {", 7)))
    assert [Path(place.uri).name for place in found] == ["base.rlhf"]
    found = await client.text_document_definition_async(lsp.DefinitionParams(editor.id, editor.at('"base', 3)))
    assert [Path(place.uri).name for place in found] == ["base.rlhf"]
    own = lsp.ReferenceContext(include_declaration=True)
    found = await client.text_document_references_async(
        lsp.ReferenceParams(own, editor.id, editor.at("param.size", 7))
    )
    assert [place.range.start for place in found] == [editor.at("size: int"), editor.at("size\n")]


@pytest.mark.asyncio
async def test_rename_reaches_the_base(client):
    editor = Editor(client)
    await editor.open()
    place = editor.at("stage.sft {", 7)
    ready = await client.text_document_prepare_rename_async(lsp.PrepareRenameParams(editor.id, place))
    assert ready.placeholder == "sft"
    edit = await client.text_document_rename_async(lsp.RenameParams(editor.id, place, "first"))
    assert "stage sft again from stage.first {" in editor.applied(edit.changes[editor.uri])
    base = Editor(client, (PARTS / "base.rlhf").read_text(encoding="utf-8"), "base.rlhf")
    text = base.applied(edit.changes[base.uri])
    assert "stage sft first {" in text and "model = stage.first," in text and "stage.first.epochs = 1" in text
    for name in ("not ok", "ppo"):
        assert await client.text_document_rename_async(lsp.RenameParams(editor.id, place, name)) is None


@pytest.mark.asyncio
async def test_code_actions_mend(client):
    editor = Editor(client)
    diagnostics = await editor.open()
    context = lsp.CodeActionContext(diagnostics)
    actions = await client.text_document_code_action_async(
        lsp.CodeActionParams(editor.id, diagnostics[0].range, context)
    )
    assert [action.title for action in actions] == ["write `lr`", "mend all that has one way out (1)"]
    right = TEXT.replace("learning_rate", "lr")
    assert all(editor.applied(action.edit.changes[editor.uri]) == right for action in actions)


@pytest.mark.asyncio
async def test_inlay_hints_and_symbols(client):
    editor = Editor(client)
    await editor.open()
    whole = lsp.Range(lsp.Position(0, 0), lsp.Position(99, 0))
    hints = await client.text_document_inlay_hint_async(lsp.InlayHintParams(editor.id, whole))
    assert [(hint.position, hint.label) for hint in hints] == [(editor.at("let.batch", 9), " = 64")]
    found = await client.text_document_document_symbol_async(lsp.DocumentSymbolParams(editor.id))
    assert [symbol.name for symbol in found] == [
        'recipe "t"', "param size", "let batch", "model other", "stage sft again",
    ]  # fmt: skip
