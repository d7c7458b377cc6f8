"""Good recipes: values, defaults, origins, references, order; -p and --set."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus import CORPUS, OK

from rlhfdsl.language import Recipe, Reference, Source, load

BASE = """\
recipe "t" { language = 1 }
param size: int = 8
param name: text = "a/b"
param sort: symbol = cosine
model tiny { arch = llama, layers = 2, hidden = 64, heads = 4 }
model other { from = param.name }
data rows { from = "./rows.jsonl", format = chat }
blend all {
  mix { rows = 100% }
  mix sft { rows = 100% }
  split { sft = 90%, eval = 10% }
}
stage sft {
  model    = model.tiny
  data     = blend.all
  batch    = param.size
  length   = 64
  lr       = 1e-3
  schedule = param.sort
}
stage sft two { model = model.other, data = blend.all, batch = 8, length = 64, lr = 1e-3 }
"""


def ok(path: Path, **options) -> Recipe:
    compilation = load(path, **options)
    assert compilation.diagnostics == () and compilation.recipe is not None
    return compilation.recipe


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "t.rlhf"
    path.write_text(BASE, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", OK, ids=lambda path: path.stem)
def test_the_good_corpus_has_no_diagnostic(path):
    ok(path)


def test_the_sample():
    recipe = ok(CORPUS / "ok" / "three-stages.rlhf")
    assert recipe.name == "opt-1.3b"
    assert [stage.address for stage in recipe.stages] == ["stage.sft", "stage.reward", "stage.ppo"]
    assert list(recipe.blocks)[:3] == ["recipe", "cluster.node", "model.base"]
    assert recipe.block["output"] == "runs/opt-1.3b" and recipe.block["seed"] == 42
    assert [block.name for block in recipe.of_kind("data")] == ["static", "own", "wiki"]
    sft, reward, ppo = recipe.stages
    assert (sft.type, sft.kind, sft.name) == ("stage.sft", "stage", "sft")
    assert (sft["lr"], sft["warmup"], sft["betas"], sft["eps"]) == (9.65e-6, 0.03, (0.9, 0.95), 1e-5)
    assert (reward["warmup"], reward["schedule"], reward["normalize"]) == (0, "cosine", True)
    assert sft["data"] == Reference("blend.chat", "sft") and sft["eval"] == Reference("blend.chat", "eval")
    actor, kl = recipe.find("stage.ppo.actor"), recipe.find("stage.ppo.kl")
    assert actor is not None and kl is not None
    assert (actor.address, actor.type, actor["schedule"], actor["ema"]) == (
        "stage.ppo.actor", "stage.ppo.actor", "constant", 0.992,
    )  # fmt: skip
    assert (kl["target"], kl["estimator"], kl["horizon"]) == (None, "k1", 10_000)
    assert ppo.blocks["every"]["samples"] is None and not ppo.blocks["every"].written("log")
    assert "ref" not in ppo.blocks and "ptx" in ppo.blocks
    assert ppo.blocks["update"]["lambda"] == 0.95
    mix = recipe.find("blend.chat.mix")
    assert mix is not None
    assert {name: s.value for name, s in mix.settings.items()} == {"static": 0.8, "own": 0.2}
    own, base = recipe.find("data.own"), recipe.find("model.base")
    assert own is not None and own["from"] == Source("path", "./data/own.jsonl", "data/own.jsonl")
    assert base is not None and base["from"] == Source("hub", "facebook/opt-1.3b", None)
    assert own["rows"] is None and own.setting("rows").origin.text == "all"
    assert own["split"] == "train" and own["turns"] == "none"


def test_arithmetic_and_parameters():
    recipe = ok(CORPUS / "ok" / "arithmetic.rlhf")
    sft, rows = recipe.stages[0], recipe.find("data.rows")
    assert rows is not None and rows["rows"] == 16_384 - 2000 + 4
    assert (sft["batch"], sft["length"], sft["lr"], sft["weight_decay"]) == (64, 334 + 3, 5e-6, 0.1)
    assert (sft["warmup"], sft["schedule"], sft["betas"]) == (0.03, "linear", (0.9, 0.95))
    blend = recipe.find("blend.some")
    assert blend is not None and blend["shuffle"] is False
    assert {k: s.value for k, s in blend.blocks["split"].settings.items()} == {"sft": 0.5, "eval": 0.5}
    assert recipe.block["seed"] == 41


def test_defaults_that_depend_on_what_is_written():
    recipe = ok(CORPUS / "ok" / "everything.rlhf")
    small, base, judge = (recipe.find(f"model.{name}") for name in ("small", "base", "judge"))
    assert small is not None and base is not None and judge is not None
    assert base["tokenizer"] == Source("hub", "facebook/opt-350m") and judge["tokenizer"] == "from"
    assert judge["from"] == Source("path", "../models/judge", "../models/judge")
    assert base["arch"] is None and base["layers"] is None and small["from"] is None
    sft = recipe.find("stage.sft")
    assert sft is not None and (sft["steps"], sft["epochs"]) == (100, None)
    assert [stage.address for stage in recipe.stages] == [
        "stage.sft", "stage.reward", "stage.short", "stage.again", "stage.long", "stage.more",
        "stage.pairs", "stage.twice", "stage.groups", "stage.others",
    ]  # fmt: skip
    mix = recipe.find("blend.chat.mix.reward")
    assert mix is not None and mix.name == "reward" and list(mix.settings) == ["own"]
    least = ok(CORPUS / "ok" / "smallest.rlhf")
    tiny = least.find("model.tiny")
    assert tiny is not None and (tiny["tokenizer"], tiny["kv_heads"], tiny["vocab"]) == ("bytes", 2, None)


def test_every_value_knows_where_it_came_from(base):
    recipe = ok(base, sets=["stage.sft.length=32"], params={"size": "16"})
    sft = recipe.find("stage.sft")
    assert sft is not None
    origins = {name: sft.setting(name).origin for name in ("lr", "epochs", "batch", "length")}
    assert {name: (origin.layer, origin.where, origin.text) for name, origin in origins.items()} == {
        "lr": ("file", "t.rlhf:18:14", "1e-3"),
        "epochs": ("default", "", "1"),
        "batch": ("param", "-p size", "param.size"),
        "length": ("set", "--set", "32"),
    }
    assert (sft["batch"], sft["length"]) == (16, 32)
    assert sft.written("lr") and not sft.written("epochs")
    span = recipe.span_of("stage.sft.lr")
    assert span is not None and BASE[span.start : span.end] == "1e-3"
    span = recipe.span_of("stage.two")
    assert span is not None and BASE[span.start : span.end] == "stage sft two"


def test_an_unknown_name_of_a_block_is_a_key_error(base):
    with pytest.raises(KeyError):
        ok(base).stages[0]["learning_rate"]


@pytest.mark.parametrize(
    ("params", "sets", "address", "value"),
    [
        ({"name": "x/y"}, [], "model.other.from", Source("hub", "x/y")),
        ({"name": '"x/y"'}, [], "model.other.from", Source("hub", "x/y")),
        ({"name": "./w"}, [], "model.other.from", Source("path", "./w", "w")),
        ({"size": "2 * 8"}, [], "stage.sft.batch", 16),
        ({"sort": "linear"}, [], "stage.sft.schedule", "linear"),
        ({}, ["recipe.seed=7"], "recipe.seed", 7),
        ({}, ["recipe.output=out/x"], "recipe.output", "out/x"),
        ({}, ['recipe.output="out/x"'], "recipe.output", "out/x"),
        ({}, ["stage.sft.every.log=3"], "stage.sft.every.log", 3),
        ({}, ["stage.sft.model=model.other"], "stage.sft.model", Reference("model.other")),
        ({}, ["stage.two.eval=blend.all.eval"], "stage.two.eval", Reference("blend.all", "eval")),
        ({}, ["model.tiny.tokenizer=bytes"], "model.tiny.tokenizer", "bytes"),
        ({}, ["model.tiny.tokenizer=x/y"], "model.tiny.tokenizer", Source("hub", "x/y")),
        ({}, ["stage.sft.lr=1e-4", "stage.sft.lr=1e-5"], "stage.sft.lr", 1e-5),
        ({"size": "4"}, ["stage.two.batch=param.size"], "stage.two.batch", 4),
        ({}, ["blend.all.split.eval=20%", "blend.all.split.sft=80%"], "blend.all.split.eval", 0.2),
        ({}, ["blend.all.mix.sft.rows=1"], "blend.all.mix.sft.rows", 1.0),
        ({}, ["data.rows.columns.messages=talk"], "data.rows.columns.messages", "talk"),
    ],
)
def test_arguments(base, params, sets, address, value):
    compilation = load(base, sets=sets, params=params)
    assert [d for d in compilation.diagnostics if d.severity == "error"] == []
    assert compilation.recipe is not None
    block, _, name = address.rpartition(".")
    found = compilation.recipe.find(block)
    assert found is not None and found[name] == value


@pytest.mark.parametrize(
    ("params", "sets", "codes", "help"),
    [
        ({"siez": "3"}, [], ["E0501"], "size"),
        ({"size": "2.5"}, [], ["E0506"], None),
        ({"size": ""}, [], ["E0102"], None),
        ({}, ["stage.sft.lr"], ["E0503"], "PATH=VALUE"),
        ({}, ["=3"], ["E0503"], None),
        ({}, ["stage.sft.lr=fast"], ["E0306"], "lr ="),
        ({}, ["stage.sft.lr=$"], ["E0110"], None),
        ({}, ["stage.sft.lr="], ["E0102"], None),
        ({}, ["stage.sft.rate=3"], ["E0504"], None),
        ({}, ["stage.sft.every.lgo=3"], ["E0504"], None),
        ({}, ["stage.stf.lr=3"], ["E0504"], "stage.sft"),
        ({}, ["stage.sft.log=3"], ["E0504"], "stage.sft.every.log"),
        ({}, ["stage.sft.lr=1e-4\n"], [], None),
        ({}, ["stage.sft=1"], ["E0504"], "name an attribute in it, for example `stage.sft.lr`"),
        ({}, ["stage.sft.every={ log = 1 }"], ["E0504"], "name an attribute in it, for example `stage.sft.every.log`"),
        ({}, ["data.rows.columns=1"], ["E0504"], "name an attribute in it, for example `data.rows.columns.NAME`"),
        ({}, ["stage.sft.warmup=150%"], ["E0307"], "for example `warmup = 3%`"),
        ({}, ["stage.sft.warmup=1.5"], ["E0307"], "did you mean 1.5%?"),
        ({}, ["seed=1"], ["E0504"], None),
    ],
)
def test_arguments_that_are_wrong(base, params, sets, codes, help):
    compilation = load(base, sets=sets, params=params)
    found = [d for d in compilation.diagnostics if d.severity == "error"]
    assert [d.code for d in found] == codes
    assert (compilation.recipe is None) == bool(codes)
    assert help is None or help in (found[0].help or "")
    assert all(d.span is not None and d.span.file in compilation.sources for d in found)


def test_two_loads_are_equal(base):
    one, two = load(base), load(base)
    assert one.recipe == two.recipe and one.diagnostics == two.diagnostics
