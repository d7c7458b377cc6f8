"""`rlhf bundle`, `plan -o x.rhplan` and running them: made twice the same, run exactly, refused when changed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import rlhf
from pipeline import write_recipe

from recipes import RECIPE, small
from rlhfdsl.planning import archive, lock, saved


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe that extends another file, in a folder below its data; the working directory is the folder above."""
    folder = tmp_path / "project" / "recipes"
    folder.mkdir(parents=True)
    small(folder)
    (folder / "pairs.jsonl").rename(folder.parent / "pairs.jsonl")
    (folder / "small.rlhf").rename(folder / "base.rlhf")
    text = (folder / "base.rlhf").read_text().replace("./pairs", "../pairs")
    (folder / "base.rlhf").write_text(text)
    (folder.parent / "pyproject.toml").touch()
    path = folder / "mine.rlhf"
    path.write_text('recipe "mine" { seed = 5 }\nextends "base.rlhf"\noverride stage.sft { lr = 2e-3 }\n')
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def runs(monkeypatch):
    """What `run` would execute: a list of (plan, base)."""
    from rlhfdsl.running import supervisor

    found = []
    monkeypatch.setattr(supervisor, "execute", lambda plan, base, show, **_: found.append((plan, base)))
    return found


@pytest.fixture
def bundle(capsys, recipe, tmp_path):
    path = tmp_path / "mine.rlhfb"
    code, out, err = rlhf(capsys, "bundle", recipe, "--gpu", "cpu", "-o", path)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].endswith(hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def edited(path, **changes):
    """The archive with other contents, and all of its hashes right: what someone makes who knows the format."""
    held = archive.unpack(path.read_bytes(), path.name)
    entries, about = dict(held.entries), json.loads(json.dumps(held.about))
    generator = changes.pop("generator", held.generator)
    for name, change in changes.items():
        if name == "about":
            change(about)
        else:
            entry = {"plan": "plan.json", "lock": "rlhf.lock"}.get(name, name)
            value = json.loads(entries[entry])
            change(value)
            entries[entry] = (json.dumps(value, indent=1) + "\n").encode()
    path.write_bytes(archive.pack(held.kind, generator, about, entries))


def test_a_bundle_runs_on_its_own_and_twice_the_same(capsys, recipe, bundle, runs, tmp_path, monkeypatch):
    again = tmp_path / "elsewhere" / "copy"
    shutil.copytree(recipe.parents[1], again)
    monkeypatch.chdir(again / "recipes")
    (again / "recipes" / "rlhf.lock").unlink()  # made anew, and yet the same
    assert rlhf(capsys, "bundle", "mine.rlhf", "--gpu", "cpu", "-o", "x.rlhfb")[0] == 0
    assert (again / "recipes" / "x.rlhfb").read_bytes() == bundle.read_bytes()
    shutil.rmtree(recipe.parents[1])
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    for _ in range(2):  # the second time its files are there already
        code, _, err = rlhf(capsys, "run", bundle)
        assert (code, err) == (0, "")
    (plan, base), second = runs
    assert second == (plan, base) and plan["recipe"]["seed"] == 5
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
    assert base == Path(f"runs/mine/bundle-{digest[:12]}/recipes")
    named = plan["data"]["data.pairs"]["from"]["path"]
    assert (there / base / named).read_bytes() == (again / "pairs.jsonl").read_bytes()
    assert not [p for p in there.rglob("*") if p.is_symlink() or "partial" in p.name]
    # and what was unpacked is not believed later
    (there / base / named).write_text("other\n")
    code, _, err = rlhf(capsys, "run", bundle)
    assert code == 1 and "E0751" in err and "pairs.jsonl" in err and len(runs) == 2


def test_a_saved_plan_runs_exactly(capsys, recipe, runs, tmp_path):
    code, out, _ = rlhf(
        capsys, "plan", recipe, "--gpu", "cpu", "--set", "stage.sft.batch=8", "-p", "nothing=1", "-o", "p.rhplan"
    )
    assert code == 1  # there is no such parameter
    sets = ("--set", "stage.sft.batch=8", "--set", "stage.sft.epochs=2")
    options = ("--gpu", "cpu", "--gpus", "2", "--price", "2", *sets)
    code, out, err = rlhf(capsys, "plan", recipe, *options, "-o", "p.rhplan")
    assert code == 0, err
    assert out.endswith(f"rlhf run p.rhplan --base {recipe.parent}\n")
    plan = json.loads(rlhf(capsys, "plan", recipe, *options, "--format", "json")[1])
    assert list(plan.pop("actions")) == [stage["address"] for stage in plan["stages"]]
    assert rlhf(capsys, "run", "p.rhplan", "--base", recipe.parent)[0] == 0
    assert runs == [(plan, recipe.parent)] and plan["stages"][0]["batch"]["batch"] == 8
    first = Path("p.rhplan").read_bytes()
    assert rlhf(capsys, "plan", recipe, *options, "-o", "q.rhplan")[0] == 0 and Path("q.rhplan").read_bytes() == first
    assert "The two plans say the same" in rlhf(capsys, "diff", "p.rhplan", "q.rhplan")[1]


def test_the_receiver_may_plan_for_other_devices(capsys, bundle, runs):
    code, _, err = rlhf(capsys, "run", bundle, "--gpu", "cpu", "--gpus", "2")
    assert code == 0 and "planned for other devices" in err
    assert runs[0][0]["target"]["world"] == 2 and runs[0][0]["stages"][0]["batch"]["batch"] == 4


def test_output_sha256_and_options_that_do_not_fit(capsys, bundle, runs):
    assert rlhf(capsys, "run", bundle, "--output", "scratch/x")[0] == 0
    plan, base = runs[0]
    (stage,) = plan["stages"]
    assert stage["output"] == "scratch/x/sft" and stage["artifacts"] == {"policy": "scratch/x/sft/model"}
    assert str(base).startswith("scratch/x/bundle-") and not Path("runs").exists()
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
    assert rlhf(capsys, "run", bundle, "--sha256", f"sha256:{digest}")[0] == 0
    code, _, err = rlhf(capsys, "run", bundle, "--sha256", "0" * 64)
    assert code == 1 and "E0751" in err and digest in err and "0" * 64 in err
    for option in (("--set", "stage.sft.lr=1"), ("-p", "a=1"), ("--profile", "x"), ("--base", ".")):
        assert rlhf(capsys, "run", bundle, *option)[0] == 2
    assert rlhf(capsys, "run", "project/recipes/mine.rlhf", "--sha256", "00")[0] == 2
    assert rlhf(capsys, "bundle", bundle)[0] == 2
    for verb in ("check", "plan", "lock"):
        code, _, err = rlhf(capsys, verb, bundle)
        assert code == 2 and "is not a recipe: `rlhf run` runs it" in err
    assert len(runs) == 2


def test_opening_a_bundle(capsys, bundle, tmp_path):
    assert rlhf(capsys, "bundle", bundle, "--open", "opened")[0] == 0
    assert rlhf(capsys, "bundle", bundle, "--open", "opened")[0] == 2  # never over something
    code, out, err = rlhf(capsys, "plan", tmp_path / "opened/recipes/mine.rlhf", "--gpu", "cpu", "--locked")
    assert (code, err) == (0, "")


# ---- what does not get through


@pytest.mark.parametrize("end", [0, 3, 100, -1])
def test_a_truncated_file(capsys, bundle, runs, end):
    bundle.write_bytes(bundle.read_bytes()[:end])
    code, _, err = rlhf(capsys, "run", bundle)
    assert code == 1 and "error[E0750]: `mine.rlhfb` is cut short" in err and not Path("runs").exists() and not runs


@pytest.mark.parametrize(
    ("edit", "shown"),
    [
        (lambda plan: plan["stages"][0]["engines"]["policy"]["schedule"].update(lr=9.0), "lr: 9.0 there, 0.002"),
        (lambda plan: plan["recipe"].update(seed=6), "recipe.seed: 6 there, 5 here"),
        (lambda plan: plan["stages"][0]["engines"]["policy"]["deepspeed"].update(
            tensorboard={"enabled": True, "output_path": "/tmp/x"}), "DeepSpeed would write to `/tmp/x`"),
        (lambda plan: plan["data"]["data.pairs"]["from"].update(path="/etc/passwd"), "/etc/passwd"),
        (lambda plan: plan["data"]["data.pairs"]["from"].update(path="../../../secret.jsonl"), "secret.jsonl"),
        (lambda plan: plan["models"]["model.tiny"]["arch"].update(hidden=64), "arch.hidden: 64 there, 32 here"),
        (lambda plan: plan["recipe"].update(output="/etc"), "/etc"),
        (lambda plan: plan["recipe"].update(output="../../x"), "../../x"),
        (lambda plan: plan["stages"][0].update(output="runs/other"), "outside its run"),
        (lambda plan: plan["stages"][0]["artifacts"].update(policy="runs/mine/sft/../../../x"), "outside its run"),
        (lambda plan: plan.update(format_version="9.0"), "format 9.0"),
        (lambda plan: plan.pop("stages"), "'stages' is a required property"),
        (lambda plan: plan["target"].update(gpus=64, world=64), "E0752"),
    ],
)  # fmt: skip
def test_a_plan_that_is_not_its_recipes(capsys, bundle, runs, edit, shown):
    edited(bundle, plan=edit)
    code, _, err = rlhf(capsys, "run", bundle)
    assert code == 1 and shown in err and "Traceback" not in err and not runs


def test_the_estimates_of_another_version_do_not_matter(capsys, bundle, runs):
    def otherwise(plan):
        stage = plan["stages"][0]
        stage["batch"]["why"], stage["memory"]["phases"] = {}, {}
        stage["time"] = {"each": {"train": 1.0}, "seconds": 1.0}

    edited(bundle, generator="rlhfdsl 0.2.0", plan=otherwise)
    code, _, err = rlhf(capsys, "run", bundle)
    assert code == 0 and runs and "E0752" not in err


def test_a_plan_of_another_version_is_refused_with_what_differs(capsys, bundle, runs):
    edited(bundle, generator="rlhfdsl 0.2.0", plan=lambda plan: plan["recipe"].update(seed=6))
    code, _, err = rlhf(capsys, "run", bundle)
    assert code == 1 and "`rlhfdsl 0.2.0` made it, and this is rlhfdsl" in err and "recipe.seed" in err and not runs


def test_options_that_someone_put_into_a_bundle(capsys, bundle, runs):
    edited(bundle, about=lambda about: about["options"]["sets"].append('recipe.output="/etc"'))
    assert "E0752" in rlhf(capsys, "run", bundle)[2]
    for broken in (
        {"recipe": "../x.rlhf"},
        {"recipe": "/etc/passwd"},
        {"options": {}},
        {"target": None},
        {"recipe": 3},
    ):
        edited(bundle, about=lambda about, broken=broken: about.update(broken))
        code, _, err = rlhf(capsys, "run", bundle)
        assert code == 1 and "E0750" in err
    assert not runs


def test_data_that_was_swapped_is_found_by_the_lock(capsys, bundle, tmp_path):
    """All hashes of the archive fit, and the lock in it is the one that was made: the stage is not started."""
    from rlhfdsl.language.diagnostics import UserError
    from rlhfdsl.running.inputs import verify_inputs

    held = archive.unpack(bundle.read_bytes(), "x")
    entries = {**held.entries, "files/pairs.jsonl": held.entries["files/pairs.jsonl"].replace(b"No.", b"Yes")}
    path = saved.unfold(saved.read(archive.pack(held.kind, held.generator, held.about, entries), "x"), tmp_path / "o")
    plan = json.loads(held.entries["plan.json"])
    with pytest.raises(UserError) as error:
        verify_inputs(plan, plan["stages"][0], path.parent)
    assert error.value.code == "E0725"


@pytest.mark.parametrize("name", ["../../evil", "/evil", "..", "a/../../../evil"])
def test_a_recipe_writes_only_where_it_is_run(capsys, tmp_path, monkeypatch, runs, name):
    monkeypatch.chdir(tmp_path)
    path = small(tmp_path)
    path.write_text(RECIPE.replace("seed = 3", f'output = "{name}"'))
    code, _, err = rlhf(capsys, "run", path, "--gpu", "cpu")
    assert code == 1 and "error[E0754]" in err and "small.rlhf:1" in err and not runs
    assert rlhf(capsys, "bundle", path, "--gpu", "cpu")[0] == 1
    # Who runs it may send it anywhere.
    assert rlhf(capsys, "run", path, "--gpu", "cpu", "--output", tmp_path / "far")[0] == 0
    assert rlhf(capsys, "run", path, "--gpu", "cpu", "--set", f'recipe.output="{tmp_path}/far"')[0] == 0
    assert [plan["stages"][0]["output"] for plan, _ in runs] == [f"{tmp_path}/far/sft"] * 2


def test_a_function_runs_only_in_a_run_and_never_from_a_bundle(capsys, tmp_path, monkeypatch, runs):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "judge.py").write_text(f"open({str(marker)!r}, 'w')\ndef judge(prompts, answers): return [0.0]\n")
    path = tmp_path / "small.rlhf"
    reward = "reward { model = stage.reward"
    text = path.read_text().replace(reward, f"{reward}\n add {{ judge = 1 }}")
    path.write_text(text + 'scorer judge { file = "./judge.py", function = "judge" }\n')
    for command in (("check",), ("lock",), ("plan", "--gpu", "cpu"), ("plan", "--gpu", "cpu", "-o", "p.rhplan")):
        code, _, err = rlhf(capsys, command[0], path, *command[1:])
        assert code == 0, err
    assert not marker.exists()
    code, _, err = rlhf(capsys, "bundle", path, "--gpu", "cpu")
    assert code == 1 and "error[E0753]: `judge.py` is Python" in err
    # The saved plan pins the file; as a bundle, or with a file from elsewhere, it is refused.
    assert rlhf(capsys, "run", "p.rhplan")[0] == 0
    (plan, base), = runs
    (tmp_path / "judge.py").write_text("def judge(prompts, answers): return [1.0]\n")
    from rlhfdsl.language.diagnostics import UserError
    from rlhfdsl.running.inputs import verify_inputs

    with pytest.raises(UserError, match="judge.py"):
        verify_inputs(plan, plan["stages"][2], base)
    held = archive.unpack(Path("p.rhplan").read_bytes(), "p")
    Path("x.rlhfb").write_bytes(archive.pack("bundle", held.generator, held.about, held.entries))
    code, _, err = rlhf(capsys, "run", "x.rlhfb")
    assert code == 1 and "E0750" in err and "a bundle holds no code" in err
    for elsewhere in ("/usr/lib/python3/shutil.py", "../judge.py"):
        Path("y.rhplan").write_bytes(Path("p.rhplan").read_bytes())
        edited(Path("y.rhplan"), plan=lambda plan, to=elsewhere: next(lock.scorers(plan))[1].update(file=to))
        code, _, err = rlhf(capsys, "run", "y.rhplan")
        assert code == 1 and "E0750" in err and elsewhere in err
    assert len(runs) == 1 and not marker.exists()


def test_pickled_weights_stay_out(capsys, tmp_path, monkeypatch):
    import torch
    from small import scratch

    monkeypatch.chdir(tmp_path)
    recipe, folder = small(tmp_path), tmp_path / "tiny"
    scratch(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2)}, folder / "pytorch_model.bin")
    arch = "arch = llama, layers = 2, hidden = 32, heads = 4"
    recipe.write_text(recipe.read_text().replace(arch, 'from = "./tiny"'))
    code, _, err = rlhf(capsys, "bundle", recipe, "--gpu", "cpu", "-o", "x.rlhfb")
    assert code == 1 and "error[E0753]: the weights of `tiny` are pickles" in err and "W0707" in err
    assert not Path("x.rlhfb").exists()


def test_secrets_stay_out(capsys, recipe, monkeypatch):
    """The environment's token is in nothing that is written, and a file that holds it is not packed."""
    token = "not-a-real-token-0123456789"
    monkeypatch.setenv("HF_TOKEN", token)
    assert rlhf(capsys, "bundle", recipe, "--gpu", "cpu", "-o", "a.rlhfb")[0] == 0
    assert rlhf(capsys, "plan", recipe, "--gpu", "cpu", "-o", "a.rhplan")[0] == 0
    assert rlhf(capsys, "plan", recipe, "--gpu", "cpu", "-o", "a.json")[0] == 0
    for path in (Path("a.rlhfb"), Path("a.rhplan"), Path("a.json"), recipe.parent / "rlhf.lock"):
        assert token.encode() not in path.read_bytes()
    text = recipe.read_text()
    recipe.write_text(text + f"# {token}\n")
    code, out, err = rlhf(capsys, "bundle", recipe, "--gpu", "cpu", "-o", "b.rlhfb")
    assert code == 1 and "E0755" in err and "HF_TOKEN" in err and token not in out + err
    monkeypatch.delenv("HF_TOKEN")
    recipe.write_text(text + "# key: " + "hf_" + "a" * 30 + "\n")
    for command in (("bundle", recipe, "-o", "b.rlhfb"), ("plan", recipe, "-o", "b.rhplan")):
        code, _, err = rlhf(capsys, *command, "--gpu", "cpu")
        assert code == 1 and "E0755" in err
    assert not Path("b.rlhfb").exists() and not Path("b.rhplan").exists()


def test_inputs_that_do_not_fit(capsys, recipe):
    code, _, err = rlhf(capsys, "bundle", recipe, "--gpu", "cpu", "--limit", "0")
    assert code == 1 and "E0753" in err and "`../pairs.jsonl`" in err and "--limit 2" in err
    base = recipe.with_name("base.rlhf")
    base.write_text(base.read_text().replace("../pairs", f"{recipe.parents[1]}/pairs"))
    code, _, err = rlhf(capsys, "bundle", recipe, "--gpu", "cpu")
    assert code == 1 and "E0753" in err and "absolute path" in err


def test_the_bytes_depend_on_nothing_of_the_process(recipe, tmp_path):
    """Another hash seed, time zone, locale, umask and working directory."""
    made = []
    for seed, zone, mask in (("0", "UTC", 0o022), ("1", "Asia/Tokyo", 0o077)):
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-m", "rlhfdsl", "bundle", str(recipe), "--gpu", "cpu", "-o", "x.rlhfb"]
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": "C"}
        subprocess.run(command, cwd=folder, env=environment, check=True, umask=mask, capture_output=True)
        made.append((folder / "x.rlhfb").read_bytes())
    assert made[0] == made[1]
