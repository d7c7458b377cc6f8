"""What a run shows while it goes: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from rlhfdsl.language.terminal import visible
from rlhfdsl.planning.figures import duration
from rlhfdsl.running.schedule import unit

Event = dict[str, Any]
PLAIN_SECONDS = 5.0  # between two progress lines of a stage when there is no terminal


class _Stdout(Console):
    """A console that says so when its reader is gone, where rich would end the program."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Note(TextColumn):
    """What a stage says of itself: on a narrow terminal it is cut, and the columns beside it are whole."""

    def __init__(self) -> None:
        super().__init__("{task.fields[note]}", table_column=Column(no_wrap=False))  # so it is the one that gives way

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class _Clock(TimeElapsedColumn):
    """The time since the stage's start, and about how long it will take."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return super().render(task) + Text(f"  {left}" if left else "")


class Display:
    """Shows the events of a run's stages. Use as a context manager and as the supervisor's `show`.

    A run is worth more than what it shows: it goes on when stdout cannot be written any more.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or _Stdout(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.printed: dict[str, float] = {}
        self.first: dict[str, tuple[int, float]] = {}  # the first update that a stage showed, and when
        if self.console.is_terminal:
            bar = max(4, min(28, self.console.width - 86))  # beside a note of 60 columns
            self.progress = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=bar), TextColumn("{task.completed}/{task.total}"),
                _Note(), _Clock(table_column=Column(no_wrap=True)), console=self.console,
            )  # fmt: skip

    def __enter__(self) -> Display:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def __call__(self, stage: dict[str, Any], event: Event) -> None:
        name = stage["address"].removeprefix("stage.")
        match event["event"]:
            case "launch":
                again = event.get("do") in ("rerun", "resume")
                self._say(name, f"starting: {event['reason']}" if again else "starting", force=again)
                self._bar(name, stage, 0, "starting")
            case "building":
                self._say(name, "building DeepSpeed's operator for the CPU: a minute or more, once", force=True)
                self._bar(name, stage, 0, "building")
            case "start":
                self._bar(name, stage, 0, "loading")
            case "update":
                self._bar(name, stage, event["update"], progress_note(event))
            case "eval" if len(event) > 4:
                self._say(name, f"{event['update']}/{event['of']}  held out: {evaluation_note(event)}", force=True)
            case "rollout":
                self._say(name, f"rollout by {event['engine']}: {event['reason']}", force="refused" in event)
            case "invariants":
                drifts = "  ".join(f"{k.removeprefix('invariant_')} {v:.1e}" for k, v in _numbers(event).items())
                self._say(name, f"checked before the first update: {drifts}", force=True)
            case "lost":
                self._say(name, f"a checkpoint cannot be used: {event['reason']}", force=True)
            case "checkpoint_failed":
                self._say(name, f"no checkpoint after {event['update']}: {event['reason']}", force=True)
            case "stopping":
                when = f"after the {'first' if event['first'] else 'current'} {unit(stage).removesuffix('s')}"
                self._say(name, f"stopping {when}, with a checkpoint; a second signal stops it at once", force=True)
            case "sample":
                self._say(name, sample_lines(event), force=True)
            case "cached":
                self._say(name, f"cached  {evaluation_note(event)}", force=True)
            case "done":
                self._say(name, f"done in {event['seconds']:.0f} s  ->  {stage['output']}", force=True)
                self._bar(name, stage, _total(stage), "done")

    def _left(self, name: str, stage: dict[str, Any], done: int) -> str:
        """How long the updates that are missing will take at the pace of those that were shown; "" where none tells."""
        now = time.monotonic()
        began, since = self.first.setdefault(name, (done, now))
        missing = _total(stage) - done
        return f"~{duration((now - since) / (done - began) * missing)} left" if done > began and missing > 0 else ""

    def _bar(self, name: str, stage: dict[str, Any], done: int, note: str) -> None:
        left = self._left(name, stage, done) if done else ""
        if self.progress is None:
            final = done == _total(stage)
            if done and note != "done" and (final or time.monotonic() - self.printed.get(name, 0.0) > PLAIN_SECONDS):
                self.printed[name] = time.monotonic()
                self._say(name, f"{done}/{_total(stage)}  {note}{left and f'  {left}'}", force=True)
            return
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(escape(f"{name:8}"), total=_total(stage), note="", left="")
        with self._heard():
            self.progress.update(self.tasks[name], completed=done, note=escape(note), left=left)

    def _say(self, name: str, text: str, force: bool = False) -> None:
        if force or self.progress is None:
            with self._heard():
                self.console.print(escape(visible(f"{name:8} {text}")))
                sys.stdout.flush()

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        """Write to stdout, and no more where that fails: the reader (`| head`) is gone, or the disk is full."""
        try:
            yield
        except OSError as error:
            self.console.quiet = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            try:
                why = f"rlhf: stdout cannot be written any more ({error.strerror or 'its reader is gone'})"
                print(f"{why}; the run goes on, and Ctrl-C stops it", file=sys.stderr, flush=True)
            except OSError:
                os.dup2(nowhere, sys.stderr.fileno())


def progress_note(event: Event) -> str:
    """The few numbers of an update that tell how it goes."""
    event = _written(event)
    if "score" in event:
        seconds = [event[f"seconds_{phase}"] for phase in ("generate", "score", "train")]
        shares = "  ".join(
            f"{phase} {100 * part / sum(seconds):.0f}%"
            for phase, part in zip(("gen", "score", "train"), seconds, strict=True)
        )
        return f"reward {event['score']:+.2f}  kl {event['kl']:z.2f}  len {event['length']:.0f}  {shares}"
    note = f"loss {event['loss']:.3f}"
    if "accuracy" in event:
        note += f"  acc {100 * event['accuracy']:.1f}%"
    return note + f"  {_short(event['tokens_per_second'])} tok/s"


def evaluation_note(event: Event) -> str:
    """A held-out evaluation in words."""
    event, words = _written(event), []
    for prefix, label in (("", ""), ("ema_", "ema ")):
        value = {k.removeprefix(prefix): v for k, v in event.items() if k.startswith(prefix + "eval_")}
        if "eval_accuracy" in value:
            words.append(f"accuracy {100 * value['eval_accuracy']:.1f}% of {value['eval_pairs']} pairs")
        elif "eval_perplexity" in value:
            words.append(f"loss {value['eval_loss']:.3f}  perplexity {value['eval_perplexity']:.2f}")
        elif "eval_score" in value:
            text = f"{label}reward {value['eval_score']:+.3f}  kl {value['eval_kl']:z.2f} nats"
            if "eval_gain" in value:
                text += (
                    f"  gain {value['eval_gain']:+.2f} standard deviations of the first policy"
                    f"  win rate {100 * value['eval_win_rate']:.0f}%"
                )
            words.append(text)
    return "  ".join(words)


def sample_lines(event: Event) -> str:
    """A prompt with the answers before and after."""
    event = _written(event)
    return (
        f"{printable(event['prompt'])}\n"
        f"           before {event['score_before']:+.2f}  {printable(event['before'])}\n"
        f"           after  {event['score_after']:+.2f}  {printable(event['after'])}"
    )


def printable(text: str) -> str:
    """Text from a model or a data file on one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _written(event: Event) -> Event:
    """An event with nan for what the metrics hold as null, a number that was not finite."""
    return {key: math.nan if value is None else value for key, value in event.items()}


def _numbers(event: Event) -> dict[str, float]:
    return {key: value for key, value in event.items() if key not in ("event", "time") and value is not None}


def _total(stage: dict[str, Any]) -> int:
    return int(stage["batch"]["rollouts" if "rollouts" in stage["batch"] else "updates"])


def _short(number: float) -> str:
    return f"{number / 1000:.0f}k" if number >= 10_000 else f"{number:.0f}"
