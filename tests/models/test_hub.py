"""Models and data of a hub, against a local server: pinned, verified, nothing run, no secret kept, and offline."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import Hub, git
from small import scratch

# Runs commands in one interpreter, since the libraries take seconds to import and read HF_ENDPOINT only once.
SHELL = """
import contextlib, io, json, sys
from pathlib import Path
from rlhfdsl.cli.main import main
from rlhfdsl.running.inputs import verify_inputs
for line in sys.stdin:
    argv, out, err = json.loads(line), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if argv[0] == "verify":
            plan, code = json.loads(Path(argv[1]).read_text()), 0
            try:
                verify_inputs(plan, plan["stages"][0], Path("."))
            except Exception as error:
                code, _ = 1, print(error.code, error.message)
        else:
            code = main(argv)
    print("answer", json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
RECIPE = """recipe "small" { seed = 3 }
model tiny { from = "org/tiny", dtype = fp32 }
data pairs { from = "org/pairs", format = preference }
stage sft { model = model.tiny, data = data.pairs, batch = 4, length = 96, lr = 1e-3 }
"""
TOKEN = "a-secret-of-the-environment-0123456789"


class Shell:
    def __init__(self, hub: Hub, folder: Path):
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHELL], cwd=folder, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __call__(self, *argv: str) -> tuple[int, str, str]:
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return tuple(json.loads(line.removeprefix("answer ")))
        raise AssertionError("the interpreter ended")

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def pairs(count: int) -> dict[str, bytes]:
    rows = ({"prompt": f"What is {n} + 1?", "chosen": f"{n + 1}", "rejected": "No."} for n in range(count))
    return {"pairs.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(), "README.md": b"# Pairs\n"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    scratch(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def shell(hub, folder):
    shell = Shell(hub, folder)
    yield shell
    shell.end()


def test_a_recipe_of_the_hub_is_held_to_its_commits_and_hashes(hub, files, shell, folder):
    first = hub.put("model", "org/tiny", files), hub.put("dataset", "org/pairs", pairs(12))
    (folder / "small.rlhf").write_text(RECIPE)
    code, out, err = shell("lock", "small.rlhf")
    assert code == 0, err

    # Commits, git's hash of small files, sha256 of large ones; a token goes to the hub and nowhere else.
    path = folder / "rlhf.lock"
    text = path.read_text()
    (model,), (edge,) = (json.loads(text)[part].values() for part in ("models", "edges"))
    assert model["hub"]["org/tiny"]["revision"] == first[0] and edge["hub"]["org/pairs"]["revision"] == first[1]
    pins = model["hub"]["org/tiny"]["files"]
    assert pins["config.json"]["git"] == "git:" + git(files["config.json"])
    assert pins["model.safetensors"]["sha256"].startswith("sha256:") and "README.md" not in pins
    assert edge["used"] == 12 and list(edge["hub"]["org/pairs"]["files"]) == ["pairs.jsonl"]
    assert any(header == f"Bearer {TOKEN}" for _, _, header in hub.requests)
    # Every file was asked for at the commit, never at a branch that may move meanwhile.
    assert not [path for _, path, _ in hub.requests if "/resolve/main/" in path]

    # The branch moves on, and the recipe stays where it is until its lock is upgraded.
    later = hub.put("model", "org/tiny", files | {"NEWS.md": b"new"}), hub.put("dataset", "org/pairs", pairs(16))
    assert shell("plan", "small.rlhf", "--gpu", "cpu", "--locked", "-o", "plan.json")[0] == 0
    assert shell("bundle", "small.rlhf", "--gpu", "cpu", "--locked", "-o", "x.rlhfb")[0] == 0
    assert path.read_text() == text
    for name in ("rlhf.lock", "plan.json", "x.rlhfb"):
        assert TOKEN.encode() not in (folder / name).read_bytes()
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["stages"][0]["edges"]["train"]["facts"]["used"] == 12

    # What a run loads is hashed first: a file of the cache that was tampered with is found, with both hashes.
    assert shell("verify", "plan.json")[0] == 0
    (cached,) = (folder / "hf").rglob(f"snapshots/{first[0]}/model.safetensors")
    whole = cached.read_bytes()
    cached.resolve().write_bytes(whole[:-1] + b"\x7f")
    code, out, _ = shell("verify", "plan.json")
    assert code == 1 and out.startswith("E0725 `model.safetensors` of `org/tiny`")
    assert out.count("sha256:") == 2 and pins["model.safetensors"]["sha256"] in out
    cached.resolve().write_bytes(whole)

    code, out, err = shell("lock", "small.rlhf", "--upgrade")
    assert code == 0, err
    upgraded = path.read_text()
    assert later[0] in upgraded and later[1] in upgraded and first[0] not in upgraded
    assert shell("plan", "small.rlhf", "--gpu", "cpu", "-o", "plan.json")[0] == 0
    assert shell("verify", "plan.json")[0] == 0


@pytest.mark.slow
def test_without_a_network_the_cache_gives_the_same_pins(hub, folder):
    path = folder / "rlhf.lock"
    before, asked = path.read_text(), len(hub.requests)
    path.unlink()
    (folder / "small.rlhf").write_text(RECIPE)
    shell = Shell(hub, folder)
    code, _, err = shell("lock", "small.rlhf", "--offline")
    shell.end()
    assert code == 0, err
    assert len(hub.requests) == asked and path.read_text() == before


def test_code_of_a_repository(hub, files, shell, folder):
    marker = folder / "ran"
    evil = f"open({str(marker)!r}, 'w')\n".encode()
    config = json.loads(files["config.json"])
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    tokens = json.loads(files["tokenizer_config.json"]) | {"auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}}
    tokens |= {"tokenizer_class": "Tok"}
    hub.put("dataset", "org/pairs", pairs(12))
    code_in_model = files | {"config.json": json.dumps(config).encode(), "evil.py": evil}
    code_in_tokenizer = files | {"tokenizer_config.json": json.dumps(tokens).encode(), "evil.py": evil}
    hub.put("model", "org/code", code_in_model)
    hub.put("model", "org/tok", code_in_tokenizer)
    hub.put("dataset", "org/script", {"script.py": evil, "README.md": b"# x\n"})
    said = {}
    for name in ("code", "tok"):
        (folder / "small.rlhf").write_text(RECIPE.replace("org/tiny", f"org/{name}"))
        code, out, said[name] = shell("lock", "small.rlhf")
        assert code == 1 or name == "tok", out
    hub.put("model", "org/tiny", files)
    (folder / "small.rlhf").write_text(RECIPE.replace("org/pairs", "org/script"))
    code, out, said["script"] = shell("lock", "small.rlhf")
    assert code == 1
    assert "E0853" in said["code"] and "such code is never run" in said["code"] and "E0816" in said["script"]
    assert not marker.exists()
    assert not any("Traceback" in text for text in said.values())


def test_pickled_weights_of_the_hub_are_locked_and_verified(hub, files, shell, folder):
    """They are what a model without safetensors has; what is beside safetensors is neither pinned nor fetched."""
    marker = folder / "unpickled"
    bare = {name: data for name, data in files.items() if not name.endswith(".safetensors")}
    pickle = {"pytorch_model.bin": f"cos\nsystem\n(S'touch {marker}'\ntR.\0".encode(), "adapter_model.bin": b"\0"}
    hub.put("dataset", "org/pairs", pairs(12))
    hub.put("model", "org/tiny", files | pickle)
    commit = hub.put("model", "org/pickle", bare | pickle)
    hub.put("model", "org/bare", bare | {"adapter_model.bin": b"\0"})
    locks, said = {}, {}
    for name in ("tiny", "pickle", "bare"):
        (folder / "small.rlhf").write_text(RECIPE.replace("org/tiny", f"org/{name}"))
        (folder / "rlhf.lock").unlink(missing_ok=True)
        code, _, said[name] = shell("lock", "small.rlhf")
        assert code == (1 if name == "bare" else 0), said[name]
        if code == 0:
            (locks[name],) = json.loads((folder / "rlhf.lock").read_text())["models"].values()
    assert "E0851" in said["bare"]
    assert not [name for name in locks["tiny"]["hub"]["org/tiny"]["files"] if ".bin" in name]
    assert "W0707" not in said["tiny"] and said["pickle"].count("W0707") == 1
    assert "the weights of `org/pickle` are in .bin form" in said["pickle"]
    assert locks["pickle"]["parameters"] is None and locks["tiny"]["parameters"] > 0
    pins = locks["pickle"]["hub"]["org/pickle"]["files"]
    assert [name for name in pins if ".bin" in name] == ["pytorch_model.bin"]
    assert pins["pytorch_model.bin"]["sha256"] == "sha256:" + hashlib.sha256(pickle["pytorch_model.bin"]).hexdigest()

    (folder / "small.rlhf").write_text(RECIPE.replace("org/tiny", "org/pickle"))
    assert shell("plan", "small.rlhf", "--gpu", "cpu", "-o", "plan.json")[0] == 0
    assert not list((folder / "hf").rglob(f"snapshots/{commit}/*.bin"))  # a plan fetches no weights
    assert shell("verify", "plan.json")[0] == 0
    (cached,) = (folder / "hf").rglob(f"snapshots/{commit}/pytorch_model.bin")
    cached.resolve().write_bytes(b"other")
    code, out, _ = shell("verify", "plan.json")
    assert code == 1 and out.startswith("E0725 `pytorch_model.bin` of `org/pickle`")
    assert not marker.exists()


@pytest.mark.parametrize(
    "model", ['from = "org/tiny"', "arch = llama, layers = 1, hidden = 32, heads = 2, vocab = 259"]
)
def test_of_another_repository_a_tokenizer_takes_its_own_files(hub, files, shell, folder, model):
    hub.put("dataset", "org/pairs", pairs(12))
    hub.put("model", "org/tiny", files)
    commit = hub.put("model", "org/tok", files | {"pytorch_model.bin": b"\0", "tokenizer.model": b"\0"})
    (folder / "small.rlhf").write_text(RECIPE.replace('from = "org/tiny"', f'{model}, tokenizer = "org/tok"'))
    (folder / "rlhf.lock").unlink(missing_ok=True)
    code, _, err = shell("lock", "small.rlhf")
    assert code == 0, err
    (locked,) = json.loads((folder / "rlhf.lock").read_text())["models"].values()
    pins = locked["hub"]["org/tok"]["files"]
    assert {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "config.json"} <= pins.keys()
    assert not [name for name in pins if "generation" in name or name.endswith((".safetensors", ".bin"))]
    assert ("model.safetensors" in locked["hub"].get("org/tiny", {"files": ()})["files"]) == model.startswith("from")
    assert shell("plan", "small.rlhf", "--gpu", "cpu", "-o", "plan.json")[0] == 0
    assert shell("verify", "plan.json")[0] == 0
    assert not list((folder / "hf").rglob(f"snapshots/{commit}/model.safetensors"))
