"""`rlhf fix`, `schema` and `completion`, and the formats of `check` for other programs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from rlhfdsl.cli.main import available, main

CORPUS = Path(__file__).parents[1] / "corpus"
BAD = CORPUS / "bad" / "E0304-word.rlhf"
WRONG = """\
recipe "t" { }
model tiny { arch: gpt2, layers = 1, hidden = 8, heads = 2, dtype = "fp32" }
data rows { from = "rows.jsonl", format = chat }
stage sft { modle = model.tyni, data = data.rows, batch = 8, length = 64, learning_rate = 1e-3 }
"""
RIGHT = """\
recipe "t" { }
model tiny { arch = gpt2, layers = 1, hidden = 8, heads = 2, dtype = fp32 }
data rows { from = "./rows.jsonl", format = chat }
stage sft { model = model.tiny, data = data.rows, batch = 8, length = 64, lr = 1e-3 }
"""


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "t.rlhf"
    path.write_text(WRONG, encoding="utf-8")
    return path


def test_everything_with_one_way_out_is_mended(wrong, capsys):
    assert main(["fix", str(wrong)]) == 0
    out, err = capsys.readouterr()
    assert wrong.read_text(encoding="utf-8") == RIGHT
    assert out == f"{wrong}: 6 mended, 0 left\n" and err.count("\n") == 6
    assert main(["fix", str(wrong)]) == 0 and capsys.readouterr().out == f"{wrong}: 0 mended, 0 left\n"


def test_a_brace_is_mended_before_what_it_hid(wrong, capsys):
    """While brackets do not pair, nothing else is told: a fix that brings other mistakes to light is a step on."""
    wrong.write_text(WRONG.replace("heads = 2, dtype = \"fp32\" }", "heads = 2, dtype = fp32"), encoding="utf-8")
    assert main(["fix", str(wrong)]) == 0
    assert wrong.read_text(encoding="utf-8") == RIGHT and ": 6 mended, 0 left" in capsys.readouterr().out


def test_diff_writes_nothing(wrong, capsys):
    assert main(["fix", "--diff", str(wrong)]) == 0
    out = capsys.readouterr().out
    assert "+" + RIGHT.splitlines()[3] in out and wrong.read_text(encoding="utf-8") == WRONG


def test_one_code_alone(wrong, capsys):
    assert main(["fix", "--code", "e0106", str(wrong)]) == 1
    assert wrong.read_text(encoding="utf-8") == WRONG.replace("arch:", "arch =")


def test_what_has_two_ways_out_is_left(tmp_path, capsys):
    path = tmp_path / "t.rlhf"
    text = RIGHT.replace("data = data.rows", "data = data.rowz") + 'data rowx { from = "./x.jsonl", format = chat }\n'
    path.write_text(text, encoding="utf-8")
    assert main(["fix", str(path)]) == 1
    assert path.read_text(encoding="utf-8") == text


def test_schemas(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "rlhf recipe"
    assert main(["schema", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"recipe", "plan", "lock"} <= set(names)
    assert main(["schema", "plna"]) == 2 and "`plan`" in capsys.readouterr().err


def test_sarif(capsys):
    assert main(["check", "--format", "sarif", str(BAD)]) == 1
    data = json.loads(capsys.readouterr().out)
    (run,) = data["runs"]
    assert data["version"] == "2.1.0" and run["tool"]["driver"]["rules"][0]["id"] == "E0304"
    result = run["results"][0]
    region = result["locations"][0]["physicalLocation"]["region"]
    assert (result["level"], region["startLine"], region["startColumn"], region["charLength"]) == ("error", 2, 72, 4)
    assert result["fixes"][0]["artifactChanges"][0]["replacements"][0]["insertedContent"] == {"text": "bf16"}


def test_github(capsys):
    assert main(["check", "--format", "github", str(BAD)]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"::error file={BAD},line=2,col=72,title=E0304::`dtype` takes one of")
    assert main(["check", "--format", "github", "no,such%file"]) == 1
    assert capsys.readouterr().out.startswith("::error title=E0891::there is no file `no,such%25file`")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_every_command(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in available()) and "--profile" in script or shell == "fish"


def test_bash_completes(capsys):
    main(["completion", "bash"])
    script = capsys.readouterr().out

    def complete(*words: str) -> list[str]:
        ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _rlhf; "
        ask += "printf '%s\\n' \"${COMPREPLY[@]}\""
        done = subprocess.run(["bash", "-c", script + ask], check=True, capture_output=True, text=True)
        return done.stdout.split()

    assert complete("rlhf", "fm") == ["fmt"]
    assert complete("rlhf", "check", "--str") == ["--strict"]
    assert complete("rlhf", "check", "--format", "sa") == ["sarif"]
