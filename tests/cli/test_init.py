"""`rlhf init`: templates with their data, and nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhfdsl.cli import init
from rlhfdsl.cli.main import main
from rlhfdsl.language import load
from rlhfdsl.language.resources import resource

TEMPLATES = sorted(path.stem for path in resource("recipes").glob("*.rlhf"))


def test_the_list(capsys):
    assert main(["init", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == TEMPLATES
    assert all(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_a_recipe_with_its_data(tmp_path: Path, capsys, name: str):
    assert main(["init", str(tmp_path / "new"), "--template", name]) == 0
    out = capsys.readouterr().out
    recipe = tmp_path / "new" / f"{name}.rlhf"
    assert f"rlhf check {recipe}" in out
    compilation = load(recipe)
    assert compilation.recipe is not None
    named = init.data_files(compilation.recipe)
    files = [path for n in named for path in ((resource("recipes") / n).rglob("*"), [resource("recipes") / n])]
    for origin in (path for some in files for path in some if path.is_file()):
        copy = recipe.parent / origin.relative_to(resource("recipes"))
        assert copy.read_bytes() == origin.read_bytes()


def test_nothing_is_overwritten(tmp_path: Path, capsys):
    (tmp_path / "quickstart.rlhf").write_text("mine", encoding="utf-8")
    assert main(["init", str(tmp_path)]) == 2
    assert "there is `" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.rlhf"]
    assert (tmp_path / "quickstart.rlhf").read_text(encoding="utf-8") == "mine"


def test_an_unknown_template(tmp_path: Path, capsys):
    assert main(["init", str(tmp_path), "--template", "qickstart"]) == 2
    assert "did you mean `quickstart`" in capsys.readouterr().err


def test_here_is_the_default(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert (tmp_path / "quickstart.rlhf").is_file()
