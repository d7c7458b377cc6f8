"""`rlhf fmt`: files, folders, stdin; nothing written with --check and --diff or after an error."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from rlhfdsl.cli import fmt
from rlhfdsl.cli.main import main
from rlhfdsl.language.format import NotEquivalent

UGLY = 'model   a{from="x/y",dtype=bf16,}\n'
FINE = 'model a { from = "x/y", dtype = bf16 }\n'


@pytest.fixture
def ugly(tmp_path: Path) -> Path:
    path = tmp_path / "a.rlhf"
    path.write_text(UGLY, encoding="utf-8")
    return path


def test_a_file_is_written_in_its_place(ugly, capsys):
    ugly.chmod(0o640)
    assert main(["fmt", str(ugly)]) == 0
    assert capsys.readouterr().out == f"wrote {ugly}\n"
    assert ugly.read_text(encoding="utf-8") == FINE and ugly.stat().st_mode & 0o777 == 0o640
    assert main(["fmt", str(ugly)]) == 0 and capsys.readouterr().out == ""


def test_check_and_diff_write_nothing(ugly, capsys):
    assert main(["fmt", "--check", str(ugly)]) == 1
    assert capsys.readouterr().out == f"would change {ugly}\n"
    assert main(["fmt", "--diff", str(ugly)]) == 0
    assert f"-{UGLY}+{FINE}" in capsys.readouterr().out
    assert ugly.read_text(encoding="utf-8") == UGLY


def test_a_folder(ugly, tmp_path, capsys, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    for folder in ("deep", ".hidden"):
        (tmp_path / folder / "b.rlhf").write_text(UGLY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["fmt"]) == 0
    assert capsys.readouterr().out == "wrote a.rlhf\nwrote deep/b.rlhf\n"
    assert (tmp_path / ".hidden" / "b.rlhf").read_text(encoding="utf-8") == UGLY


def test_stdin(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(UGLY.encode())))
    assert main(["fmt", "-"]) == 0 and capsys.readouterr().out == FINE
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(UGLY.encode())))
    assert main(["fmt", "--check", "-"]) == 1 and capsys.readouterr().out == ""


def test_a_file_with_a_syntax_error_stays(tmp_path, capsys):
    path = tmp_path / "a.rlhf"
    path.write_text("model a {\n  from =\n}\n", encoding="utf-8")
    assert main(["fmt", str(path)]) == 1
    assert "E0102" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "model a {\n  from =\n}\n"
    assert main(["fmt", str(tmp_path / "none.rlhf")]) == 1
    (tmp_path / "empty").mkdir()
    assert main(["fmt", str(tmp_path / "empty")]) == 2


def test_a_result_that_says_something_else_is_never_written(ugly, capsys, monkeypatch):
    def broken(source):
        raise NotEquivalent("no")

    monkeypatch.setattr(fmt, "format_text", broken)
    assert main(["fmt", str(ugly)]) == 3
    assert ugly.read_text(encoding="utf-8") == UGLY
