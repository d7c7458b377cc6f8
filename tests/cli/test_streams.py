"""Where what a command says goes: a reader that is gone, a full disk, a stream that is closed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RECIPE = "recipes/quickstart.rlhf"


def rlhf(*arguments, **streams):
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run([sys.executable, "-m", "rlhfdsl", *arguments], text=True, check=False, **given)


@pytest.mark.parametrize("arguments", [("explain", "E0711"), ("check", RECIPE), ("schema",)])
def test_a_full_disk_is_no_bug_of_the_program(arguments):
    with open("/dev/full", "w") as full:
        done = rlhf(*arguments, stdout=full)
    assert (done.returncode, done.stderr) == (2, "rlhf: cannot write: No space left on device\n")


@pytest.mark.parametrize("arguments", [("explain", "E0711"), ("check", RECIPE), ("fmt", "--diff", RECIPE)])
def test_a_stream_that_is_closed(arguments):
    for stream in (1, 2):
        done = rlhf(*arguments, preexec_fn=lambda stream=stream: os.close(stream))
        assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_is_gone():
    reader, writer = os.pipe()
    os.close(reader)
    done = rlhf("schema", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_pipe_gets_is_utf_8_in_every_locale(tmp_path):
    (tmp_path / "x.rlhf").write_text('recipe "żółw 🐢" { }\nstage sft { }\n', encoding="utf-8")
    plain = {"env": os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, "encoding": "utf-8"}
    assert "żółw 🐢" in rlhf("fmt", "-", input=(tmp_path / "x.rlhf").read_text(encoding="utf-8"), **plain).stdout
    done = rlhf("check", str(tmp_path / "x.rlhf"), **plain)
    assert (done.returncode, done.stderr) == (1, "") and "żółw 🐢" in done.stdout


def from_stdin(folder, text, *arguments):
    where = {"cwd": folder, "env": os.environ | {"PYTHONPATH": os.getcwd()}}
    return rlhf(*arguments, input=text, **where)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder with what the quickstart reads, its recipe, and a mistake in it."""
    folder = tmp_path_factory.mktemp("stdin")
    assert rlhf("init", str(folder)).returncode == 0
    text = (folder / "quickstart.rlhf").read_text()
    (folder / "quickstart.rlhf").unlink()
    return folder, text, text.replace("seed     = 7", "sede     = 7")


@pytest.mark.parametrize(
    "arguments",
    [
        *("check -", "fmt --check -", "explain - model.tiny"),
        *("plan -", "plan - --gpus 1,2", "graph -", "lock -", "diff - -"),
    ],
)
def test_a_recipe_from_stdin_lies_in_the_current_folder(quickstart, arguments):
    folder, text, wrong = quickstart
    done = from_stdin(folder, text, *arguments.split())
    assert (done.returncode, done.stderr) == (0, "")
    if not arguments.startswith(("fmt", "explain")):  # which read what they can
        done = from_stdin(folder, wrong, *arguments.split())
        assert done.returncode == 1 and "--> <stdin>:5:3" in done.stdout + done.stderr


def test_a_recipe_from_stdin_is_mended_to_stdout(quickstart):
    folder, text, wrong = quickstart
    for given in (wrong, text):
        done = from_stdin(folder, given, "fix", "-")
        assert (done.returncode, done.stdout) == (0, text)


@pytest.mark.parametrize("arguments", [("run", "-"), ("bundle", "-"), ("plan", "-", "-o", "x.rhplan")])
def test_what_is_kept_needs_a_file(quickstart, arguments):
    folder, text, _ = quickstart
    done = from_stdin(folder, text, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("rlhf: a recipe from stdin cannot be ")
    assert done.stderr.endswith(": write it to a file first\n")


@pytest.mark.parametrize(("text", "code"), [("", "E0894"), ('{"a": 1}', "E0895")])
@pytest.mark.parametrize("verb", ["check", "fmt", "fix", "plan"])
def test_what_is_no_recipe_is_told_of_stdin_too(tmp_path, verb, text, code):
    done = from_stdin(tmp_path, text, verb, "-")
    assert done.returncode == 1 and f"error[{code}]: `<stdin>` is " in done.stdout + done.stderr
