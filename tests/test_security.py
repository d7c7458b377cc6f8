"""The threats of docs/security.md that no other test tries, and that each row there has its test."""

import ast
import json
import os
import pickle
import re
import socket
from pathlib import Path

import pytest
import torch
from command import rlhf
from safetensors.torch import load_file

import rlhfdsl
from recipes import RECIPE, small
from rlhfdsl.language import load
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.terminal import same_width, visible

ROOT = Path(__file__).parents[1]
# Colours, the window's title, the clipboard, a C1 introducer, the direction of writing, no width, a line separator.
EVIL = "\x1b[31mred\x1b]0;title\x07\x1b]52;c;cm0gLXJm\x1b\\\x9b2J\u202egnp.exe\u200b\u2028\x00\r\x08[bold]x[/bold]"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f]")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small(tmp_path)


def test_every_row_has_a_test():
    texts = (path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    tests = {name for text in texts for name in re.findall(r"def (test_\w+)", text)}
    rows = [line for line in (ROOT / "docs/security.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[3])
        assert named and set(named) <= tests, row


# ---- the terminal


def test_what_is_visible():
    shown = visible(EVIL)
    assert not RAW.search(shown) and shown.startswith("\\x1b[31mred\\x1b]0;title\\x07") and "[bold]x" in shown
    assert visible("Grüße, 你好 👋\n\tend") == "Grüße, 你好 👋\n\tend"
    assert len(same_width(EVIL)) == len(EVIL) and not RAW.search(same_width(EVIL))


def test_nothing_reaches_the_terminal_raw(capsys, recipe):
    """Data, columns, file names, locks, plans and settings that carry escape sequences, through every command."""
    pairs = recipe.parent / "pairs.jsonl"
    rows = [{"prompt": f"{EVIL} {n}", "chosen": EVIL, "rejected": f"no {EVIL}"} for n in range(40)]
    good = "".join(json.dumps(row) + "\n" for row in rows)
    pairs.write_text(good)
    plan = ("plan", recipe, "--gpu", "cpu", "--set", "stage.sft.length=1024")
    said = [rlhf(capsys, *plan), rlhf(capsys, *plan, "-o", "a.rhplan")]
    assert [code for code, _, _ in said] == [0, 0]
    pairs.write_text(json.dumps({EVIL: "x"}) + "\n")
    said.append(rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--locked"))
    said.append(rlhf(capsys, "plan", recipe, "--gpu", "cpu"))
    # As escapes in a text of the recipe, and raw in a comment.
    escaped = "".join(f"\\u{ord(c):04x}" for c in EVIL if ord(c) < 0x10000)
    for text in (
        RECIPE.replace("./pairs.jsonl", f"./{escaped}.jsonl"),
        RECIPE.replace("seed = 3", f'output = "runs/{escaped}"'),
        RECIPE.replace("format = preference", f'format = preference, split = "{escaped}"'),
        RECIPE + f"# {EVIL}\n",
        RECIPE + f"stage sft{EVIL} {{ }}\n",
    ):
        recipe.write_text(text)
        pairs.write_text(good)
        for command in ("check", "plan", "lock", "explain", "graph"):
            options = ("data.pairs.from",) if command == "explain" else ()
            said.append(rlhf(capsys, command, recipe, *options))
    (recipe.parent / f"evil{EVIL}.rlhf".replace("/", "").replace("\x00", "")).write_text("recipe")
    said.append(rlhf(capsys, "check", recipe.parent / "evi.rlhf"))
    said.append(rlhf(capsys, "run", f"{EVIL}.rlhfb".replace("\x00", "")))
    recipe.with_name("rlhf.lock").write_text(json.dumps({"version": EVIL}))
    said.append(rlhf(capsys, "plan", recipe, "--gpu", "cpu"))
    for code, out, err in said:
        assert code in (0, 1, 2)
        assert not RAW.search(out + err), (out + err)[:2000]


def test_markup_is_text(capsys):
    """What a run shows goes through rich, which would take brackets for colours and links."""
    import io

    from rich.console import Console

    from rlhfdsl.running.display import Display

    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=False, highlight=False, soft_wrap=True))
    text = f"[red]a[/red] [link=http://x]b[/link] {EVIL}"
    sample = {"event": "sample", "prompt": text, "before": text, "after": text, "score_before": 0.0, "score_after": 1.0}
    stage = {"address": "stage.sft", "output": f"runs/{text}", "kind": "sft", "batch": {"updates": 1}}
    display(stage, sample)
    display(stage, {"event": "done", "seconds": 1.0})
    assert out.getvalue().count("[red]a[/red] [link=http://x]b[/link]") == 4 and not RAW.search(out.getvalue())


# ---- files


def test_deepspeed_writes_nowhere_else(capsys, monkeypatch, recipe):
    monkeypatch.setattr("rlhfdsl.cli.packages._LOGS", ())  # whether tensorboard is installed is not asked here
    home = str(recipe.parent)
    for escape in (
        f'flops_profiler {{ enabled = on, output_file = "{home}/x" }}',
        f'tensorboard {{ enabled = on, output_path = "{home}" }}',
        'csv_monitor { enabled = on, output_path = "../x", job_name = "j" }',
        'csv_monitor { enabled = on, output_path = "x", job_name = "../../j" }',
    ):
        recipe.write_text(RECIPE.replace("lr = 1e-3\n", f"lr = 1e-3\n  deepspeed {{ {escape} }}\n"))
        code, _, err = rlhf(capsys, "run", recipe, "--gpu", "cpu")
        assert code == 1 and "error[E0754]: DeepSpeed would write to" in err, err
    assert not Path("runs").exists()


def test_a_recipe_includes_nothing_from_outside(tmp_path):
    inside = tmp_path / "project"
    inside.mkdir()
    (tmp_path / "secret.rlhf").write_text(RECIPE)
    (inside / "link.rlhf").symlink_to(tmp_path / "secret.rlhf")
    (inside / "pyproject.toml").touch()
    for path in ("../secret.rlhf", "link.rlhf", str(tmp_path / "secret.rlhf"), "~/x.rlhf", "a/../../secret.rlhf"):
        (inside / "mine.rlhf").write_text(f'recipe "mine" {{ seed = 1 }}\nextends "{path}"\n')
        assert "E0211" in {d.code for d in load(inside / "mine.rlhf").diagnostics}, path


def test_a_huge_recipe_is_refused(tmp_path):
    path = tmp_path / "huge.rlhf"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    assert [d.code for d in load(path).diagnostics] == ["E0901"]
    path.write_text("a { " * 200)
    assert "E0902" in [d.code for d in load(path).diagnostics]


def test_a_token_in_a_recipe_is_an_error(recipe):
    recipe.write_text(RECIPE + "# hf auth: " + '"hf_' + "a" * 34 + '"\n')
    assert [d.code for d in load(recipe).diagnostics] == ["E0319"]


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def pickled(tmp_path) -> Path:
    """A model with weights in .bin form alone, and `ran`, which is touched when code in them is."""
    from small import scratch

    folder = tmp_path / "model"
    scratch(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_that_no_lock_pins_are_not_opened(pickled, tmp_path):
    """Even by a plan that says so itself, without the lock's look at the folder."""
    from small import spec

    from rlhfdsl.models.loading import load_model

    for name in ("pytorch_model.bin", "model.pt", "adapter_model.bin"):
        (pickled / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(UserError) as error:
        load_model(spec(), str(pickled), revision=None, seed=1)
    assert error.value.code == "E0820" and not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_that_hold_more_than_tensors_run_nothing(pickled, tmp_path):
    from small import spec

    from rlhfdsl.models.loading import load_model

    path = pickled / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)

    def load() -> UserError:
        with pytest.raises(UserError) as error:
            load_model(spec(), str(pickled), revision=None, seed=1, pickles=["pytorch_model.bin"])
        return error.value

    for zipped in (True, False):
        torch.save(weights | {"x": Evil(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
        refused = load()
        assert refused.code == "E0852" and "GLOBAL posix.system" in refused.help
        assert "weights_only" not in refused.help  # not torch's advice to load it unsafely
    torch.save({"model": weights}, path)
    assert "not a table of tensors" in load().help
    torch.save(weights, path)
    whole = path.read_bytes()
    for damaged in (b"", b"\x80\x04.", b"version https://git-lfs.github.com/spec/v1\n", whole[:-100], whole[:5000]):
        path.write_bytes(damaged)
        assert load().code == "E0852"
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin", "b": "other.bin"}}
    path.rename(pickled / "pytorch_model-00001-of-00001.bin")
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="other.bin, which is not locked"):
        load_model(spec(), str(pickled), revision=None, seed=1, pickles=["pytorch_model-00001-of-00001.bin"])
    assert not (tmp_path / "ran").exists()


def test_a_template_cannot_reach_python(tmp_path):
    import jinja2

    from rlhfdsl.models.tokenizers import byte_tokenizer, render

    tokenizer = byte_tokenizer()
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['os'].system('touch ran') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ):
        tokenizer.chat_template = attack
        try:
            (text,) = render(tokenizer, [[{"role": "user", "content": "x"}]], generation=True)
        except (jinja2.TemplateError, TypeError):
            continue
        assert text == "", attack  # an attribute that is not there renders as nothing


# ---- the program itself


def test_no_shell_and_no_pickle_in_the_program():
    for path in Path(rlhfdsl.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("shell", "False") == "False" and called not in ("os.system", "os.popen", "eval"), path
            assert given.get("trust_remote_code", "False") == "False", path
            # DeepSpeed's own files in a checkpoint are pickles: read when a manifest of this program has their bytes.
            ours = path.match("engines/checkpoint/keeper.py")
            assert called != "torch.load" or given.get("weights_only") == "True" or ours, path


def test_planning_opens_no_connection(capsys, recipe, monkeypatch):
    assert rlhf(capsys, "lock", recipe)[0] == 0

    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    text = RECIPE.replace('arch = llama, layers = 2, hidden = 32, heads = 4', 'from = "facebook/opt-125m"')
    other = recipe.with_name("hub.rlhf")
    other.write_text(text)
    for command in (
        ("check", recipe), ("fmt", "--check", recipe), ("plan", recipe, "--gpu", "cpu", "--locked"),
        ("lock", recipe, "--check"), ("bundle", recipe, "--gpu", "cpu", "--locked", "-o", "x.rlhfb"),
        ("plan", other, "--gpu", "cpu", "--no-lock"), ("graph", other),
    ):  # fmt: skip
        assert rlhf(capsys, *command)[0] in (0, 1), command
