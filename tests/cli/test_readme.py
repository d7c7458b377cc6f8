"""The README: its recipe is right, its commands exist, its targets are the Makefile's."""

import re
from pathlib import Path

from rlhfdsl.cli.main import available
from rlhfdsl.language import load

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
