"""The recipes of the examples are sound and in their one form. What they read is made by the reader, and not here."""

from pathlib import Path

import pytest

from rlhfdsl.language import load
from rlhfdsl.language.format import layout

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/*.rlhf")), ids=lambda path: path.stem)
def test_a_recipe_of_an_example_is_sound(path: Path) -> None:
    compilation = load(path)
    assert compilation.diagnostics == () and compilation.recipe is not None
    text = path.read_text(encoding="utf-8")
    assert layout(text) == text
