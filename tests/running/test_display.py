"""What the live display shows on terminals of several widths."""

import io

import pytest
from rich.console import Console

from rlhfdsl.running.display import Display, evaluation_note, progress_note, sample_lines

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


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_says_how_long_it_will_take_at_its_pace(terminal, monkeypatch):
    """Four of ten updates in 30 s after the first: 10 s each, and six are missing: 60 s. Going on counts anew."""
    clock = [100.0]
    monkeypatch.setattr("rlhfdsl.running.display.time.monotonic", lambda: clock[0])
    console = Console(width=120, force_terminal=terminal, file=io.StringIO(), color_system=None, soft_wrap=True)
    display = Display(console)
    stage = {"address": "stage.sft", "batch": {"updates": 10}, "output": "runs/x/sft"}

    def update(number):
        display(stage, {"event": "update", "update": number, "loss": 1.0, "tokens_per_second": 9.0})
        if terminal:
            console.print(display.progress.get_renderable())
        return console.file.getvalue().splitlines()[-1].rstrip()

    assert "left" not in update(1)
    clock[0] += 30.0
    assert update(4).endswith("~1.0 m left")
    clock[0] += 60.0
    assert "left" not in update(10)


def test_a_stage_that_is_asked_to_stop_says_after_what():
    def told(batch, first):
        console = Console(file=io.StringIO(), soft_wrap=True)
        Display(console)({"address": "stage.sft", "batch": batch}, {"event": "stopping", "first": first})
        return console.file.getvalue()

    assert "stopping after the first update," in told({"updates": 10}, True)
    assert "stopping after the current rollout," in told({"rollouts": 10}, False)


def test_a_number_that_was_not_finite_is_shown_as_that():
    seconds = {"seconds_generate": 1.0, "seconds_score": 1.0, "seconds_train": 2.0}
    assert progress_note({"score": None, "kl": None, "length": 8.0} | seconds).startswith("reward +nan  kl nan  len 8")
    assert progress_note({"loss": None, "tokens_per_second": 9.0}) == "loss nan  9 tok/s"
    assert evaluation_note({"eval_score": None, "eval_kl": 0.0}) == "reward +nan  kl 0.00 nats"
    sample = {"prompt": "a", "before": "b", "after": "c", "score_before": None, "score_after": 1.0}
    assert "before +nan  b" in sample_lines(sample)
