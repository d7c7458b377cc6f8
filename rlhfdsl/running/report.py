"""One HTML page of a run: what each stage is at, came to, and looked like on the way.

`read` makes plain data of a run's folder, `page` writes it into report.html.jinja. Nothing of the page comes from
elsewhere, and whatever a recipe, a data file or a model wrote is text in it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.terminal import visible
from rlhfdsl.planning import figures, measured
from rlhfdsl.planning.render import devices
from rlhfdsl.planning.validate import validate_plan
from rlhfdsl.running import cache, chart, failure, records, schedule, supervisor
from rlhfdsl.running.chart import Series
from rlhfdsl.running.metrics import read_texts

Json = dict[str, Any]
ANSWERS = 10  # held-out prompts that are shown
LETTERS = 1500  # of a text that is shown
_PHASES = ("generate", "score", "train")

# ---- what a page says


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head; a note says what they are of."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart with its title; stacked: its series are parts of a whole."""

    title: str
    series: Sequence[Series]
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A text with the score that it got."""

    text: str
    score: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt and what was answered. number: of the rollout, None for held-out prompts."""

    prompt: str
    answers: Sequence[Answer]
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage. state: "finished", "running", "stopped" or "not begun"; detail: how it came to it, and what to know of
    it. done: updates (PPO: rollouts) of `of`. resumes: after how many of them it went on from a checkpoint."""

    name: str
    kind: str
    state: str
    done: int
    of: int
    unit: str
    detail: Sequence[str] = ()
    seconds: str = ""
    memory: str = ""
    evaluation: Table | None = None
    truth: Table | None = None
    panels: Sequence[Panel] = ()
    resumes: Sequence[int] = ()
    answers: Sequence[Asked] = ()
    prompts: int = 0  # that have answers, of which `answers` are the first
    samples: Sequence[Asked] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A run. facts and versions: (what, which)."""

    name: str
    facts: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]
    stages: Sequence[Stage]


# ---- what is drawn


@dataclass(frozen=True, slots=True)
class _Line:
    """A metric of updates, or of evaluations, by the name that it has in a chart."""

    metric: str
    name: str
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class _Chart:
    title: str
    lines: Sequence[_Line]
    stacked: bool = False


def _chart(title: str, metric: str, name: str | None = None, held_out: str | None = None) -> _Chart:
    """A metric, and beside it the same of evaluations."""
    lines = [_Line(metric, name or title.lower())]
    return _Chart(title, [*lines, _Line(held_out, "held out", True)] if held_out is not None else lines)


def _phases(title: str, prefix: str, *, stacked: bool) -> _Chart:
    return _Chart(title, [_Line(f"{prefix}_{phase}", phase) for phase in _PHASES], stacked)


_SPEED = (
    _chart("Tokens a second", "tokens_per_second"),
    _Chart("TFLOP/s of each device", [_Line("tflop_per_second_train", "TFLOP/s")]),
)
_STEP = (_chart("Learning rate", "lr"), _chart("Gradient norm", "grad_norm"), *_SPEED)
_LOSS = _chart("Loss", "loss", "training", "eval_loss")
_PAIRS = (
    _LOSS,
    _chart("Accuracy", "accuracy", "training", "eval_accuracy"),
    _chart("Margin", "margin", "training", "eval_margin"),
)
_ON_POLICY = (
    _chart("Score, before the KL penalty", "score", "rollouts", "eval_score"),
    _chart("KL to the reference, nats an answer", "kl", "rollouts", "eval_kl"),
    _chart("Reward, with the KL penalty", "reward"),
    _chart("Deviation of the scores", "score_std", "rollouts", "eval_score_std"),
    _chart("Length, tokens", "length", "rollouts", "eval_length"),
    _chart("Answers that ended, share", "ended", "rollouts", "eval_ended"),
    _chart("Entropy, nats a token", "entropy"),
    _Chart("Clipped, share of tokens", [_Line("clipped", "policy"), _Line("value_clipped", "values")]),
    _chart("Value loss", "value_loss"),
    _chart("Explained variance of the values", "explained_variance"),
    _chart("Policy loss", "policy_loss"),
    _chart("Pretraining loss", "ptx_loss"),
    _Chart("Gradient norm", [_Line("actor_grad_norm", "actor"), _Line("critic_grad_norm", "critic")]),
    _Chart("Learning rate", [_Line("actor_lr", "actor"), _Line("critic_lr", "critic")]),
    _chart("KL coefficient", "kl_coefficient"),
    _chart("Parity: rollout against training, nats a token", "parity"),
    _phases("Seconds of a rollout", "seconds", stacked=True),
    _phases("TFLOP/s of each device", "tflop_per_second", stacked=False),
)
_CHARTS = {
    "sft": (_LOSS, *_STEP), "reward": (*_PAIRS, *_STEP), "ppo": _ON_POLICY, "grpo": _ON_POLICY, "rloo": _ON_POLICY,
    "dpo": (
        *_PAIRS,
        _Chart("Implicit reward, held out", [
            _Line("eval_chosen_reward", "chosen", True), _Line("eval_rejected_reward", "rejected", True),
        ]),
        *_STEP,
    ),
}  # fmt: skip

# Of an evaluation: what it is called, and whether it is a share.
_NAMES = {
    "eval_loss": ("loss", False), "eval_perplexity": ("perplexity", False),
    "eval_accuracy": ("accuracy", True), "eval_accuracy_error": ("standard error of the accuracy, at most", True),
    "eval_margin": ("margin", False), "eval_reward_mean": ("mean reward", False),
    "eval_reward_std": ("deviation of the rewards", False), "eval_chosen_reward": ("reward of chosen answers", False),
    "eval_rejected_reward": ("reward of rejected answers", False), "eval_score": ("score", False),
    "eval_score_std": ("deviation of the scores", False), "eval_kl": ("KL to the reference, nats an answer", False),
    "eval_length": ("length, tokens", False), "eval_ended": ("answers that ended", True),
    "eval_gain": ("gain, deviations of the first policy's scores", False),
    "eval_win_rate": ("win rate against the first policy", True),
}  # fmt: skip
_COUNTS = ("row", "pair", "prompt")


# ---- from a run's folder


def read(folder: Path) -> Report:
    """What there is to say of a run, also of one that still runs. Raises UserError when it is none, or is damaged."""
    validate_plan(records.plan_of(folder))
    run = records.read(folder)
    plan = run.plan
    recipe, keys = plan["recipe"], cache.keys_of(folder)
    # A run takes its stages in order and moves aside what it makes anew: the first without a result is the one at work.
    working = next((s["address"] for s in plan["stages"] if not _finished(run.stages.get(s["address"]))), None)
    working = working if supervisor.at_work(folder) else None
    stages: list[Stage] = []
    times: list[str] = []
    ran: Json = {}
    for stage in plan["stages"]:
        record = run.stages.get(stage["address"])
        try:
            key = keys.get(stage["address"])
            stages.append(_stage(stage, record, key, running=stage["address"] == working))
            if record is not None:
                times += [_moment(event["time"]) for event in record.events[:1] + record.events[-1:]]
            if record is not None and record.result is not None:
                ran = {**record.result["versions"], "python": record.result["python"]}
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise _damaged(stage, record) from error
    facts = [
        ("recipe", recipe["file"]),
        ("target", devices(plan["target"])),
        ("seed", str(recipe["seed"])),
    ]
    if recipe["determinism"] == "strict":
        facts.append(("determinism", "strict"))
    if times:
        facts += [("begun", min(times)), ("last written", max(times))]
    versions = {"rlhfdsl": plan["generator"].removeprefix("rlhfdsl "), **ran}
    return Report(recipe["name"], facts, [(name, str(version)) for name, version in versions.items()], stages)


def _stage(stage: Json, record: records.Record | None, key: str | None, *, running: bool) -> Stage:
    batch, unit = stage["batch"], measured.unit(stage)
    of = batch["rollouts" if "rollouts" in batch else "updates"]
    name = stage["address"].removeprefix("stage.")
    if record is None:
        return Stage(name, stage["kind"], "running" if running else "not begun", 0, of, unit)
    finished, events = _finished(record), record.events
    result = record.result if finished else None
    if finished and result is None:
        raise _damaged(stage, record, schedule.RESULT)
    done = max((_whole(event["update"]) for event in events if "update" in event), default=0)
    detail = [] if events else ["There are no metrics of this stage."]
    if result is not None and key is not None and result.get("key") != key:
        detail.append("It was made by another plan than the one that lies in the run's folder now.")
    if not finished and not running:
        detail += _end(stage, record)
    seconds = supervisor.seconds_of(events) if result is None else result["seconds"]
    peak = measured.of_events(events).peak
    prompts = read_texts(record.folder / "answers.jsonl", _HELD_OUT)
    samples = read_texts(record.folder / "samples.jsonl", _SAMPLED)
    return Stage(
        name, stage["kind"], "finished" if finished else "running" if running else "stopped", done, of, unit, detail,
        figures.duration(seconds) if seconds else "", "" if peak is None else f"{figures.gib(peak)} GiB",
        _evaluation(events, result, unit), _truth(stage, events), _panels(stage, events),
        [_whole(event["update"]) for event in events if event["event"] == "resume"],
        [_before_and_after(row) for row in prompts[:ANSWERS]], len(prompts), _first_and_last(samples),
    )  # fmt: skip


def _finished(record: records.Record | None) -> bool:
    return record is not None and not record.folder.name.endswith(schedule.PARTIAL)


def _end(stage: Json, record: records.Record) -> list[str]:
    """Why a stage that is not complete does not run."""
    last = record.events[-1] if record.events else {}
    if last.get("event") == "stopped":
        saved = "with a checkpoint" if last["saved"] else "without a new checkpoint"
        return [f"It was stopped after {last['update']} of {last['of']}, {saved}."]
    failed = failure.left_by(stage, record.folder)
    why = "" if failed is None else f": {failed.message} ({failed.code})"
    return [f"It broke off{why}; its output is in {record.folder.name}/log.txt."]


def _damaged(stage: Json, record: records.Record | None, file: str | None = None) -> UserError:
    what = "the record" if file is None else f"the {file}"
    place = None if record is None else str(record.folder if file is None else record.folder / file)
    return UserError("E0720", f"{what} of {stage['address']} cannot be read", place=place,
                     help="delete the stage's folder and run the recipe again")  # fmt: skip


def _evaluation(events: Sequence[Json], result: Json | None, unit: str) -> Table | None:
    """The last evaluation beside the first one, which was before any update, and that of the averaged weights."""
    evaluations = [event for event in events if event["event"] == "eval" and any(_of_eval(event))]
    before = next((event for event in evaluations if event["update"] == 0), {})
    later = [event for event in evaluations if event["update"] > 0 and _of_eval(event)]
    after: Mapping[str, Any] = (later[-1] if later else {}) if result is None else result["evaluation"]
    told = {"eval_score_before", *(f"eval_{name}s" for name in _COUNTS)}  # elsewhere in the table
    names = [name for name in dict.fromkeys((*_of_eval(before), *_of_eval(after))) if name not in told]
    if not names:
        return None
    columns = [("before", before, ""), ("after", after, "")] if before else [("", after, "")]
    if any(name.startswith("ema_") for name in after):
        columns.append(("averaged weights", after, "ema_"))
    head = ["", *(title for title, _, _ in columns)]
    rows = [
        [_name(name), *(_value(name, values.get(prefix + name)) for _, values, prefix in columns)]
        for name in names
    ]  # fmt: skip
    held = after or before
    counts = {name: held[f"eval_{name}s"] for name in _COUNTS if f"eval_{name}s" in held}
    note = "; ".join(figures.count(count, name) for name, count in counts.items())
    if result is None:
        note += f"; after {figures.count(later[-1]['update'] if later else 0, unit)}"
    return Table(head, rows, note)


def _of_eval(event: Mapping[str, Any]) -> list[str]:
    return [name for name in event if name.startswith("eval_")]


def _name(name: str) -> str:
    return _NAMES[name][0] if name in _NAMES else name.removeprefix("eval_").replace("_", " ")


def _value(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if name in _NAMES and _NAMES[name][1] else chart.short(value)


def _truth(stage: Json, events: Sequence[Json]) -> Table | None:
    """What was measured, beside what the plan predicted of it; a plan for a CPU predicts no time."""
    rows = [row for row in measured.rows(stage, measured.of_events(events)) if row.measured is not None]
    cells = [records.truth_cells(stage, row) for row in rows]
    if all(row.predicted is None for row in rows):
        return Table(["", "measured"], [[what, found] for what, _, found, _ in cells]) if rows else None
    return Table(["", "predicted", "measured", "off by"], cells)


def _panels(stage: Json, events: Sequence[Json]) -> list[Panel]:
    """The charts of the metrics that matter to a kind of stage; one without a number is left out."""
    charts = list(_CHARTS[stage["kind"]])
    sources = stage["settings"].get("reward", {}).get("sources", [])
    if len(sources) > 1:
        charts.insert(1, _Chart("Score of each scorer", [_Line(f"score_{s['name']}", s["name"]) for s in sources]))
    out: list[Panel] = []
    for one in charts:
        series: list[Series] = []
        for line in one.lines:
            kind = "eval" if line.held_out else "update"
            names = {each.metric for each in one.lines} if one.stacked else {line.metric}
            found = (e for e in events if e["event"] == kind and names <= e.keys())
            points = [(_whole(e["update"]), _real(e[line.metric])) for e in found]
            if any(y is not None for _, y in points):
                series.append(Series(line.name, points, dots=line.held_out))
        if series and not _still(one, series):
            out.append(Panel(one.title, series, one.stacked))
    return out


def _whole(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 53:
        raise ValueError(f"{value!r} is not a count")
    return value


def _real(value: Any) -> float | None:
    if value is not None and not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value


def _still(one: _Chart, series: Sequence[Series]) -> bool:
    """Whether it is a coefficient that nothing moved."""
    return one.title == "KL coefficient" and len({y for _, y in series[0].points}) == 1


# ---- texts

_HELD_OUT = {"prompt", "before", "after", "score_before", "score_after"}
_SAMPLED = {"rollout", "prompt", "answer", "score"}


def _before_and_after(row: Json) -> Asked:
    return Asked(_cut(row["prompt"]), [Answer(_cut(row[at]), _score(row[f"score_{at}"])) for at in ("before", "after")])


def _first_and_last(rows: Sequence[Json]) -> list[Asked]:
    """The answers of the first rollout that was kept, and of the last one."""
    ends = {rows[0]["rollout"], rows[-1]["rollout"]} if rows else set()
    return [
        Asked(_cut(row["prompt"]), [Answer(_cut(row["answer"]), _score(row["score"]))], row["rollout"])
        for row in rows if row["rollout"] in ends
    ]  # fmt: skip


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LETTERS else f"{text[:LETTERS]} … ({figures.number(len(text))} characters)"


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:+.2f}"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


# ---- the page


def page(report: Report) -> str:
    """The report as HTML that needs no other file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def draw(panel: Panel, stage: Stage) -> Markup:
        picture = chart.stack if panel.stacked else chart.lines
        marks = [(at, f"went on from a checkpoint after {figures.count(at, stage.unit)}") for at in stage.resumes]
        return Markup(picture(panel.title, panel.series, stage.unit, marks))

    def text(value: Any) -> Any:
        return value if isinstance(value, Markup) else visible(str(value))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=text, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        report=report, draw=draw, count=figures.count, number=figures.number
    )
