"""extends, override, import, let, copies and profiles: what the values become, and where they came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus import CORPUS

from rlhfdsl.language import Recipe, Reference, Source, load

LAYERS = CORPUS / "ok" / "layers.rlhf"


def ok(path: Path = LAYERS, **options) -> Recipe:
    compilation = load(path, **options)
    assert compilation.diagnostics == () and compilation.recipe is not None
    return compilation.recipe


def value(recipe: Recipe, address: str):
    block, _, name = address.rpartition(".")
    found = recipe.find(block)
    assert found is not None
    return found[name]


def test_the_values_of_every_layer():
    recipe = ok()
    assert recipe.name == "layers"
    assert value(recipe, "recipe.seed") == 7 and value(recipe, "recipe.output") == "runs/layers"
    assert (value(recipe, "stage.sft.epochs"), value(recipe, "stage.sft.steps")) == (None, 100)
    assert value(recipe, "stage.sft.length") == 256 and value(recipe, "stage.sft.every.log") == 5
    assert value(recipe, "stage.ppo.kl.target") is None
    split = recipe.find("blend.all.split")
    assert split is not None and {k: s.value for k, s in split.settings.items()} == {
        "sft": 0.5, "reward": 0.25, "ppo": 0.25,
    }  # fmt: skip
    assert (value(recipe, "stage.again.epochs"), value(recipe, "stage.again.steps")) == (3, None)
    assert value(recipe, "stage.again.batch") == 32 and value(recipe, "stage.again.lr") == 1e-3
    assert value(recipe, "stage.third.batch") == 32 and value(recipe, "stage.third.length") == 128
    assert value(recipe, "stage.long.rollout.answer") == 128 and value(recipe, "stage.long.rollout.prompt") == 64
    assert value(recipe, "parallel.deep.zero") == 3


def test_what_excludes_another_takes_away_what_stands_only_beside_it(tmp_path):
    base = (CORPUS / "ok" / "smallest.rlhf").read_text(encoding="utf-8")
    (tmp_path / "base.rlhf").write_text(base, encoding="utf-8")
    (tmp_path / "own.rlhf").write_text(
        'recipe "own" { }\nextends "base.rlhf"\noverride model.tiny { from = "a/b" }\n', encoding="utf-8"
    )
    for recipe in (ok(tmp_path / "own.rlhf"), ok(tmp_path / "base.rlhf", sets=["model.tiny.from=a/b"])):
        assert value(recipe, "model.tiny.from") == Source("hub", "a/b")
        assert value(recipe, "model.tiny.arch") is value(recipe, "model.tiny.layers") is None
    kept = load(tmp_path / "base.rlhf", sets=["model.tiny.from=a/b", "model.tiny.layers=2"])
    assert [problem.code for problem in kept.diagnostics] == ["E0311"]


def test_a_path_over_a_hub_id_leaves_its_revision_unused(tmp_path):
    base = (CORPUS / "ok" / "three-stages.rlhf").read_text(encoding="utf-8")
    base = base.replace('"facebook/opt-1.3b", dtype', '"facebook/opt-1.3b", revision = "main", dtype')
    (tmp_path / "base.rlhf").write_text(base, encoding="utf-8")
    sets = ["model.base.from=./own", "data.wiki.from=./wiki.parquet"]  # which has a subset
    assert value(ok(tmp_path / "base.rlhf", sets=sets), "model.base.from").kind == "path"
    again = load(tmp_path / "base.rlhf", sets=[*sets, "data.wiki.subset=x"])
    assert [problem.code for problem in again.diagnostics] == ["E0311"]


def test_imported_names_have_the_import_in_front():
    recipe = ok()
    assert value(recipe, "stage.sft.model") == Reference("model.m.small")
    assert value(recipe, "stage.third.parallel") == Reference("parallel.deep")
    assert value(recipe, "stage.again.parallel") == Reference("parallel.m.shard")
    mix = recipe.find("blend.mine.mix")
    assert mix is not None and list(mix.settings) == ["m.rows", "m.more"]
    inner = recipe.find("blend.m.both.mix")
    assert inner is not None and list(inner.settings) == ["m.rows", "m.more"]
    assert value(recipe, "model.m.small.from") == Source("hub", "facebook/opt-125m")
    small = ok(params={"m.org": "x/y"})
    assert value(small, "model.m.small.from") == Source("hub", "x/y")


def test_paths_are_relative_to_the_file_that_names_them():
    recipe = ok()
    assert value(recipe, "data.rows.from").path == "../parts/rows.jsonl"
    assert value(recipe, "data.m.rows.from").path == "../parts/rows.jsonl"
    assert value(recipe, "data.m.more.from").path == "../more.jsonl"
    assert value(recipe, "model.m.judge.from").path == "../parts/judge"
    given = ok(params={"m.org": "./own"})
    assert value(given, "model.m.small.from").path == "own"


def test_a_profile_is_stronger_than_the_files_and_weaker_than_set():
    recipe = ok(profile="debug")
    assert value(recipe, "stage.again.batch") == 16
    assert value(recipe, "stage.long.rollout.answer") == 8
    assert value(recipe, "stage.again.every.log") == 1 and value(recipe, "stage.sft.every.log") == 5
    # The base's profile of the same name comes first, the file's own over it.
    assert value(recipe, "stage.sft.epochs") == 2 and value(recipe, "stage.sft.steps") is None
    recipe = ok(profile="debug", sets=["stage.long.rollout.answer=9", "stage.sft.steps=3"])
    assert value(recipe, "stage.long.rollout.answer") == 9
    assert (value(recipe, "stage.sft.epochs"), value(recipe, "stage.sft.steps")) == (None, 3)
    assert value(ok(profile="big"), "model.m.small.dtype") == "fp32"
    wrong = load(LAYERS, profile="debgu")
    assert [(d.code, d.help) for d in wrong.diagnostics] == [("E0508", "did you mean `debug`?")]


def test_the_chain_of_a_value():
    recipe = ok(profile="debug", sets=["stage.long.rollout.answer=9"])
    rollout = recipe.find("stage.long.rollout")
    assert rollout is not None
    setting = rollout.setting("answer")
    chain = [setting.origin, *setting.earlier]
    assert [(o.layer, o.where, o.text) for o in chain] == [
        ("set", "--set", "9"),
        ("profile", "layers.rlhf:46:31", "8"),
        ("file", "layers.rlhf:37:22", "let.answer"),
        ("base", "../parts/base.rlhf:42:47", "64"),
    ]
    sft = recipe.find("stage.sft")
    assert sft is not None
    assert [o.layer for o in (sft.setting("model").origin, *sft.setting("model").earlier)] == ["file", "base"]


def test_a_let_that_reads_a_given_parameter_is_given():
    recipe = ok(params={"scale": "4"})
    again = recipe.find("stage.again")
    assert again is not None and again["batch"] == 64
    assert again.setting("batch").origin.layer == "param"
    assert again.setting("batch").origin.where == "-p scale"


def test_files_of_a_project_only(tmp_path: Path):
    outside = tmp_path / "outside.rlhf"
    outside.write_text("model a { from = \"a/b\" }\n", encoding="utf-8")
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "link.rlhf").symlink_to(outside)
    for text in ("../outside.rlhf", "link.rlhf"):
        path = folder / "x.rlhf"
        path.write_text(f'import "{text}" as m\nrecipe "x" {{ }}\n', encoding="utf-8")
        assert [d.code for d in load(path).diagnostics] == ["E0211"]
    (tmp_path / ".git").mkdir()
    assert [d.code for d in load(path).diagnostics] == ["E0209"]


def test_limits_of_includes(tmp_path: Path):
    for number in range(20):
        text = f'extends "{number + 1}.rlhf"\nrecipe "r{number}" {{ }}\n'
        (tmp_path / f"{number}.rlhf").write_text(text, encoding="utf-8")
    assert [d.code for d in load(tmp_path / "0.rlhf").diagnostics] == ["E0904"]
    (tmp_path / "m.rlhf").write_text('model a { from = "a/b" }\n', encoding="utf-8")
    many = "".join(f'import "m.rlhf" as m{n}\n' for n in range(70))
    (tmp_path / "w.rlhf").write_text(many + 'recipe "w" { }\n', encoding="utf-8")
    assert {d.code for d in load(tmp_path / "w.rlhf").diagnostics} == {"E0904"}


@pytest.mark.parametrize("sets", [["model.m.small.dtype=fp32"], ["blend.mine.mix.m.rows=25%"]])
def test_set_reaches_imported_names(sets):
    assert ok(sets=sets)


def test_a_mistake_of_an_included_file_shows_there(tmp_path: Path):
    (tmp_path / "base.rlhf").write_text('model a { from = "a/b", dtype = bf17 }\n', encoding="utf-8")
    path = tmp_path / "x.rlhf"
    path.write_text('extends "base.rlhf"\nrecipe "x" { }\n', encoding="utf-8")
    compilation = load(path)
    (wrong,) = [d for d in compilation.diagnostics if d.code == "E0304"]
    assert wrong.span is not None and wrong.span.file.endswith("base.rlhf")
    assert compilation.sources[wrong.span.file].where(wrong.span).endswith("base.rlhf:1:33")
