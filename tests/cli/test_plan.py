"""`rlhf plan` and `rlhf lock` as a user runs them, on a recipe with a little data."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from command import rlhf

from recipes import RECIPE, small
from rlhfdsl.cli.plan import to_json
from rlhfdsl.cli.saving import read_plan
from rlhfdsl.planning.validate import validate_lock, validate_plan

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "deepspeed", "jsonschema", "rich", "numpy", "tokenizers")


@pytest.fixture
def recipe(tmp_path):
    """A recipe with 40 pairs beside it."""
    return small(tmp_path)


def test_plan_makes_the_lock(capsys, recipe):
    code, out, err = rlhf(capsys, "plan", recipe, "--gpu", "cpu")
    assert (code, err) == (0, "")
    locked = json.loads((recipe.parent / "rlhf.lock").read_text())
    validate_lock(locked)
    assert len(locked["edges"]) == 2 and len(locked["models"]) == 1
    used = {facts["used"] for facts in locked["edges"].values()}
    assert sum(used) == 40  # the two parts share out the 40 prompts
    assert "(known after lock)" not in out and "Human: What is" in out
    again = rlhf(capsys, "plan", recipe, "--gpu", "cpu")
    assert again == (0, out, "")


def test_json_and_output_are_the_same_bytes_but_for_what_a_run_would_do(capsys, recipe, tmp_path):
    saved = tmp_path / "plan.json"
    code, out, _ = rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--format", "json", "-o", saved)
    plan = json.loads(out)
    validate_plan(plan)
    assert plan.pop("actions") == {"stage.sft": {"do": "run", "reason": "it has not run yet"}}
    assert code == 0 and saved.read_text() == to_json(plan)
    printed = tmp_path / "printed.json"
    printed.write_text(out)
    assert read_plan(printed) == plan
    assert plan["stages"][0]["edges"]["train"]["facts"]["files"]["pairs.jsonl"]["bytes"] > 0


def test_no_lock_makes_nothing(capsys, recipe):
    code, out, _ = rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--no-lock")
    assert code == 0 and "(known after lock)" in out
    assert not (recipe.parent / "rlhf.lock").exists()


def test_lock_check_and_stale_files(capsys, recipe):
    code, out, _ = rlhf(capsys, "lock", recipe, "--check")
    assert code == 1
    assert out.splitlines() == ["missing  model.tiny", "missing  stage.sft.train", "missing  stage.sft.eval"]
    code, out, _ = rlhf(capsys, "lock", recipe)
    assert code == 0 and out.splitlines()[:3] == [
        "made     model.tiny", "made     stage.sft.train", "made     stage.sft.eval",
    ]  # fmt: skip
    assert rlhf(capsys, "lock", recipe, "--check")[0] == 0
    with (recipe.parent / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}) + "\n")
    code, out, _ = rlhf(capsys, "lock", recipe, "--check")
    assert code == 1 and out.splitlines()[0] == "changed  pairs.jsonl"
    assert rlhf(capsys, "plan", recipe, "--gpu", "cpu")[0] == 0
    locked = json.loads((recipe.parent / "rlhf.lock").read_text())
    assert sum(facts["used"] for facts in locked["edges"].values()) == 41


HUB = """recipe "hub" { output = "runs/hub" }
model base { from = "facebook/opt-1.3b" }
data pairs { from = "./pairs.jsonl", format = preference }
stage sft { model = model.base, data = data.pairs, batch = 8, length = 64, lr = 1e-5 }
"""


def test_a_hub_that_cannot_be_had_leaves_a_plan(capsys, recipe, monkeypatch):
    """The catalog's numbers and no rows; what is saved to be run, and a run, need all."""
    from rlhfdsl.language import UserError
    from rlhfdsl.models import facts

    def unreachable(entry, base, address):
        raise UserError("E0855", "`facebook/opt-1.3b` cannot be read from the hub", at=address, help="a network")

    monkeypatch.setattr(facts, "model_facts", unreachable)
    path = recipe.with_name("hub.rlhf")
    path.write_text(HUB, encoding="utf-8")
    code, out, err = rlhf(capsys, "plan", path, "--gpu", "h100-80g")
    assert code == 0 and "1.32 B" in out and "(known after lock)" in out
    assert "warning[W0708]: `facebook/opt-1.3b` cannot be read from the hub" in err and "a run needs it" in err
    for command in (["plan", path, "-o", path.with_suffix(".json")], ["lock", path], ["run", path]):
        code, _, err = rlhf(capsys, *command)
        assert code == 1 and "error[E0855]" in err and "W0708" not in err


def test_stale_facts_make_no_errors(capsys, recipe):
    """Too few rows, then more of them: the old count must not be what the next plan judges by."""
    pairs = recipe.parent / "pairs.jsonl"
    many = pairs.read_text()
    pairs.write_text("".join(many.splitlines(keepends=True)[:6]))
    code, _, err = rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--set", "stage.sft.batch=8")
    assert code == 1 and "E0704" in err
    pairs.write_text(many)
    assert rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--set", "stage.sft.batch=8")[0] == 0


def test_errors_have_windows_and_exit_1(capsys, recipe):
    code, out, err = rlhf(capsys, "plan", recipe, "--gpu", "a100-80g", "--gpus", "8", "--no-lock")
    assert (code, out) == (1, "")
    assert "error[E0701]: batch = 4 sequences do not split over 8 GPUs" in err
    assert "small.rlhf:10:11" in err and "= help: batch = 8" in err


def test_errors_as_json(capsys, recipe):
    code, out, _ = rlhf(
        capsys, "plan", recipe, "--gpus", "8", "--gpu", "l4-24g", "--no-lock", "--format", "json"
    )
    assert code == 1
    (found,) = json.loads(out)["diagnostics"]
    assert (found["code"], found["span"]["start"]["line"]) == ("E0701", 10)


def test_bad_data_is_shown_at_its_setting(capsys, recipe):
    (recipe.parent / "pairs.jsonl").write_text('{"prompt": "a"}\n')
    code, _, err = rlhf(capsys, "plan", recipe, "--gpu", "cpu")
    assert code == 1 and err.startswith("error[E08") and "small.rlhf:3:" in err and "in pairs.jsonl" in err


def test_a_broken_lock_is_refused(capsys, recipe):
    (recipe.parent / "rlhf.lock").write_text("not json")
    code, _, err = rlhf(capsys, "plan", recipe, "--gpu", "cpu")
    assert code == 1 and "E0720" in err and "delete it" in err


def test_unknown_gpus(capsys, recipe):
    code, _, err = rlhf(capsys, "plan", recipe, "--gpu", "a100")
    assert code == 2 and "not in the catalog of GPUs: did you mean `a100-40g`, `a100-80g`?" in err
    recipe.write_text(RECIPE + 'cluster node { gpus = 8, gpu = "a100" }\n')
    code, _, err = rlhf(capsys, "plan", recipe)
    assert code == 1 and "error[E0714]" in err and '"a100"' in err and "did you mean `a100-40g`" in err


def test_a_price_is_a_number(capsys, recipe):
    code, _, err = rlhf(capsys, "plan", recipe, "--price", "x")
    assert code == 2 and err.endswith("argument --price: takes a number from 0, not `x`\n")


def test_overrides(capsys, recipe):
    code, out, _ = rlhf(
        capsys, "plan", recipe, "--gpu", "cpu", "--no-lock", "--set", "stage.sft.batch=8", "--format", "json"
    )
    plan = json.loads(out)
    assert code == 0 and plan["stages"][0]["batch"]["batch"] == 8
    assert plan["origins"]["stage.sft.batch"]["layer"] == "set"


# ---- what a plan costs


def imported(*arguments, cwd):
    """The heavy modules in the interpreter after a command, and its seconds."""
    code = (
        "import sys; from rlhfdsl.cli.main import main\n"
        "code = main(sys.argv[1:]); assert code == 0, code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done, seconds = timed(code, *arguments, cwd=cwd)
    return done.stderr.strip().splitlines()[-1], seconds


def timed(code, *arguments, cwd):
    """The finished interpreter that ran `code`, and the CPU seconds of the fastest of three: a busy machine changes
    them little."""

    def used():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    best = float("inf")
    for _ in range(3):
        started = used()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        best = min(best, used() - started)
    return done, best


@pytest.mark.parametrize("options", [("--no-lock",), ()])
def test_planning_is_light(capsys, recipe, options, record_property):
    """Nothing heavy is imported, and the command takes less than a second beside a bare interpreter."""
    assert rlhf(capsys, "lock", recipe)[0] == 0
    loaded, seconds = imported("plan", str(recipe), "--gpu", "cpu", *options, cwd=recipe.parent)
    assert loaded == "[]"
    _, bare = timed("pass", cwd=recipe.parent)
    record_property("seconds", seconds - bare)
    assert seconds - bare < 1.0, f"plan took {seconds:.2f} s, a bare interpreter {bare:.2f} s"
