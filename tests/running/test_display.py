"""What the live display shows on terminals of several widths."""

import io

import pytest
from rich.console import Console

from rlhfdsl.running.display import Display

NOTE = "reward +0.29  kl 0.74  len 12  gen 19%  score 20%  train 60%"


@pytest.mark.parametrize(("width", "shown"), [(60, "kl 0.74  len 12  …"), (80, "score 20%  …"), (120, NOTE)])
def test_a_narrow_terminal_cuts_the_note_and_nothing_else(width, shown):
    console = Console(width=width, force_terminal=True, file=io.StringIO(), color_system=None)
    display = Display(console)
    display.progress.add_task("ppo     ", total=50, completed=50, note=NOTE)
    console.print(display.progress.get_renderable())
    line = console.file.getvalue().splitlines()[0]
    assert line.startswith("ppo      ━━━━") and " 50/50 " in line
    assert shown in line and line.rstrip().endswith("0:00:00")
