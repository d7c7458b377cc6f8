"""The README: its recipe is right, its commands exist, its targets are the Makefile's."""

import argparse
import re
from pathlib import Path

import pytest

from rlhfdsl.cli.main import available, module_of
from rlhfdsl.language import load
from rlhfdsl.running.metrics import MetricsWriter

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_recipe_is_right(tmp_path):
    (block,) = re.findall(r"```hcl\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "mine.rlhf"
    path.write_text(block)
    compilation = load(path)
    assert [d.message for d in compilation.diagnostics] == []
    assert [stage.address for stage in compilation.recipe.stages] == ["stage.sft", "stage.reward", "stage.ppo"]


def test_the_table_of_commands_is_complete():
    table = README[README.index("| verb") : README.index("A run leaves")]
    named = {verb for row in table.strip().splitlines()[2:] for verb in re.findall(r"`([a-z]+)`", row.split("|")[1])}
    assert named == set(available())


def test_the_two_commands_are_targets():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) == {"demo", "test"} <= set(targets)


def test_the_commands_of_the_guides_exist():
    for guide in (ROOT / "docs").glob("*.md"):
        for block in re.findall(r"^```\n(.*?)^```", guide.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for verb, rest in re.findall(r"^rlhf (\w+)(.*)$", block, re.MULTILINE):
                parser = argparse.ArgumentParser()
                module_of(verb).configure(parser)
                options = {name for action in parser._actions for name in action.option_strings}
                assert set(re.findall(r" (--[\w-]+)", rest.partition("#")[0])) <= options, (guide.name, verb, rest)


def test_the_curves_of_the_guide_are_read_from_a_metrics_file(tmp_path, monkeypatch):
    """Drawing them needs matplotlib, which is not required here: the frame that would be drawn is looked at."""
    pandas = pytest.importorskip("pandas")
    guide = (ROOT / "docs" / "after-a-run.md").read_text(encoding="utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "pandas" in c)
    report = MetricsWriter(tmp_path / "metrics.jsonl")
    report("start", stage="stage.ppo")
    for update in (1, 2):
        report("update", update=update, of=2, score=0.5 * update, kl=0.1, length=8.0)
    report("eval", update=2, of=2, eval_score=1.0)
    drawn = []
    monkeypatch.setattr(pandas.DataFrame, "plot", lambda self, **options: drawn.append(self))
    exec(code.replace("runs/mine/ppo", str(tmp_path)), {})
    assert drawn[0]["score"].to_dict() == {1: 0.5, 2: 1.0} and list(drawn[0]) == ["score", "kl", "length"]
