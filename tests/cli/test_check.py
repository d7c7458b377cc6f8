"""`rlhf check`, and what all commands share: the overview, unknown commands, bugs, interrupts."""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfdsl import __version__
from rlhfdsl.cli import check, main

CORPUS = Path(__file__).parents[1] / "corpus"
GOOD = str(CORPUS / "ok" / "three-stages.rlhf")
BAD = str(CORPUS / "bad" / "E0304-word.rlhf")
WARNS = str(CORPUS / "bad" / "W0201-unreached.rlhf")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_a_good_recipe(capsys):
    assert run(capsys, "check", GOOD) == (0, "ok  3 stages, 2 models, 1 blend\n", "")


def test_a_bad_recipe(capsys):
    code, out, err = run(capsys, "check", BAD)
    assert (code, err) == (1, "")
    assert out.startswith("error[E0304]: `dtype` takes one of `bf16`") and out.endswith("\n2 errors\n")
    assert "\x1b" not in out


def test_several_files(capsys):
    code, out, _ = run(capsys, "check", GOOD, BAD)
    assert code == 1
    assert f"{GOOD}: ok" in out and f"{BAD}: 2 errors" in out


def test_warnings_are_errors_when_strict(capsys):
    code, out, _ = run(capsys, "check", WARNS)
    assert code == 0 and out.endswith("ok  1 stage, 2 models  4 warnings\n")
    code, out, _ = run(capsys, "check", "--strict", WARNS)
    assert code == 1 and out.endswith("\n4 warnings\n")


def test_json(capsys):
    code, out, _ = run(capsys, "check", "--format", "json", GOOD, BAD)
    data = json.loads(out)
    assert code == 1 and data["format_version"] == "1.0"
    assert [d["code"] for d in data["diagnostics"]] == ["E0304", "E0304"]


def test_arguments_reach_the_recipe(capsys):
    assert run(capsys, "check", GOOD, "-p", "seed=7", "--set", "stage.ppo.kl.coef=0.05")[0] == 0
    code, out, _ = run(capsys, "check", GOOD, "--set", "stage.ppo.kl.coef=-1")
    assert code == 1 and "--> --set:1:19" in out
    code, _, err = run(capsys, "check", GOOD, "-p", "seed")
    assert code == 2 and "NAME=VALUE" in err


def test_a_missing_file(capsys):
    code, out, _ = run(capsys, "check", "nowhere.rlhf")
    assert code == 1 and out.startswith("error[E0891]: there is no file `nowhere.rlhf`")


def test_overview_and_version(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and "check " in out and "rlhf init DIR" in out
    assert run(capsys, "--help")[1] == out
    assert run(capsys, "--version") == (0, f"rlhf {__version__}\n", "")
    code, out, _ = run(capsys, "check", "--help")
    assert code == 0 and "--strict" in out


def test_an_unknown_command_suggests(capsys):
    code, _, err = run(capsys, "chekc")
    assert code == 2 and "did you mean `rlhf check`" in err
    assert run(capsys, "frobnicate")[0] == 2
    assert run(capsys, "check")[0] == 2


def test_a_bug_says_so(capsys, monkeypatch):
    def broken(args):
        raise ValueError("a\nb")

    monkeypatch.setattr(check, "run", broken)
    code, out, err = run(capsys, "check", GOOD)
    assert (code, out) == (3, "")
    assert "this is a bug in rlhfdsl" in err and "ValueError: a" in err and "Traceback" not in err
    assert "Traceback" in run(capsys, "check", GOOD, "--debug")[2]
    monkeypatch.setenv("RLHF_DEBUG", "1")
    assert "Traceback" in run(capsys, "check", GOOD)[2]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "out"), 2, "out: Permission denied"),
    ],
)
def test_what_is_no_bug(capsys, monkeypatch, error, code, text):
    def broken(args):
        raise error

    monkeypatch.setattr(check, "run", broken)
    found, _, err = run(capsys, "check", GOOD)
    assert found == code and text in err and "bug" not in err


@pytest.mark.parametrize("verb", ["check", "fmt"])
def test_what_takes_long_to_import_is_not(verb):
    heavy = ("lark", "jsonschema", "rich", "torch", "transformers", "deepspeed", "yaml", "numpy")
    code = f"import sys; from rlhfdsl.cli.main import main; main(['{verb}', {GOOD!r}]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(heavy) & set(done.stdout.split())


def test_it_is_fast():
    """Under 250 ms, twice that where bytecode is not kept: CPU time, which a busy machine changes little."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    times = []
    for _ in range(3):
        started = used()
        subprocess.run([sys.executable, "-m", "rlhfdsl", "check", GOOD], check=True, capture_output=True)
        times.append(used() - started)
    assert min(times) < 0.5


PACKED = """recipe "x" { }
model wide { arch = llama, layers = 2, hidden = 64, heads = 4 }
data rows { from = "./rows.jsonl", format = text }
stage sft {
  model = model.wide, data = data.rows, batch = 8, length = 64, lr = 1e-3, loss = all
  lora { rank = 4, base = nf4 }
}
"""
LOGGED = "deepspeed { wandb { enabled = on }, tensorboard { enabled = off }, csv_monitor { enabled = on } }"


def test_a_package_that_is_needed_and_absent(tmp_path, capsys, monkeypatch):
    """Where the recipe is checked and planned, at the setting that needs it; and not where nothing needs it."""
    path = tmp_path / "x.rlhf"
    path.write_text(PACKED)
    assert main.main(["check", str(path)]) == 0
    find, needed = importlib.util.find_spec, ("bitsandbytes", "wandb", "tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in needed else find(name, *rest))
    for command in (["check", str(path)], ["plan", "--gpu", "cpu", "--no-lock", str(path)]):
        assert main.main(command) == 1
        said = "".join(capsys.readouterr())
        assert "error[E0823]" in said and "pip install 'rlhfdsl[qlora]'" in said and "x.rlhf:6:27" in said
    path.write_text(PACKED.replace(", base = nf4", ""))
    assert main.main(["check", str(path)]) == 0
    capsys.readouterr()
    path.write_text(PACKED.replace("lora { rank = 4, base = nf4 }", LOGGED))
    assert main.main(["check", str(path)]) == 1
    said = "".join(capsys.readouterr())
    assert "error[E0825]: a log of DeepSpeed needs the package wandb" in said and "x.rlhf:6:33" in said
    assert said.count("error[") == 1
