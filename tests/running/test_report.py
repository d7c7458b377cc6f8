"""`rlhf report`: the page of a run that is finished, runs, broke off or is damaged."""

import fcntl
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import rlhf

from rlhfdsl.planning.keys import keys
from rlhfdsl.running import report

PLAN = json.loads((Path(__file__).parents[1] / "planning" / "golden" / "pipeline.json").read_text())
BEGUN = 1_800_000_000.0  # 2027-01-15 08:00 UTC
EVIL = "<script>alert(1)</script>\x1b[31m\u202e& \ud800"
STEP = {"lr": 1e-5, "grad_norm": 0.5, "tokens_per_second": 41_000.0, "seconds": 0.5, "tflop_per_second_train": 210.0}
ROLLOUT = {
    "kl_coefficient": 0.05, "score_std": 0.9, "reward": 0.1, "length": 180.0, "ended": 0.9, "parity": 1e-3,
    "explained_variance": 0.4, "value_loss": 0.2, "clipped": 0.05, "value_clipped": 0.1, "policy_loss": -0.01,
    "entropy": 2.0, "actor_lr": 1e-6, "critic_lr": 5e-6, "actor_grad_norm": 1.0, "critic_grad_norm": 2.0,
    "seconds_generate": 2.0, "seconds_score": 1.0, "seconds_train": 5.0, "tflop_per_second_generate": 40.0,
    "tflop_per_second_score": 180.0, "tflop_per_second_train": 220.0,
}  # fmt: skip


def write(home: Path, events: list[dict], **result) -> Path:
    """A stage's folder with its metrics, ten seconds between two events; with a result where it is finished."""
    home.mkdir(parents=True, exist_ok=True)
    stamped = [{"event": e.pop("event"), "time": BEGUN + 10 * i} | e for i, e in enumerate(events)]
    (home / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in stamped))
    if result:
        made = {"key": keys(PLAN)[f"stage.{home.name}"], "seconds": 250.0, "versions": {"torch": "2.11.0"}}
        target = {"device": "cuda", "gpu": "a6000-48g", "world": 4}
        (home / "result.json").write_text(json.dumps(made | {"python": "3.11.7", "target": target} | result))
    return home


def jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sft(run: Path) -> Path:
    losses = {n: 1 + math.exp(-n / 40) for n in range(1, 234)}
    rows = [{"event": "update", "update": n, "of": 234, "loss": loss, **STEP} for n, loss in losses.items()]
    rows[100]["loss"] = None  # not finite
    events = [
        {"event": "start", "stage": "stage.sft"},
        {"event": "eval", "update": 0, "of": 234, "eval_loss": 2.25, "eval_perplexity": 9.488, "eval_rows": 588},
        *rows,
        {"event": "resume", "update": 120, "of": 234},
        {"event": "update", "update": 234, "of": 234, "loss": 1.1, **STEP},
        {"event": "end", "peak_memory": 3 * 2**30},
    ]
    return write(run / "sft", events, evaluation={"eval_loss": 1.125, "eval_perplexity": 3.08, "eval_rows": 588})


def ppo(home: Path, rollouts: int = 60, **result) -> Path:
    events = [
        {"event": "start", "stage": "stage.ppo"},
        {"event": "eval", "update": 0, "of": 118, "eval_score": -0.5, "eval_kl": 0.0, "eval_prompts": 32},
        *({"event": "update", "update": n, "of": 118, "score": n / 100, "kl": 0.1 * n, **ROLLOUT}
          for n in range(1, rollouts + 1)),
        {"event": "eval", "update": rollouts, "of": 118, "eval_score": 0.75, "eval_kl": 6.5, "eval_prompts": 32,
         "eval_win_rate": 0.875, "eval_score_before": -0.5},
    ]  # fmt: skip
    write(home, events, **result)
    jsonl(home / "samples.jsonl", [
        {"rollout": n, "prompt": "Human: hello", "answer": f"answer {n}", "score": n / 10} for n in (10, 10, 20, 30)
    ])  # fmt: skip
    return home


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(PLAN))
    return folder


def stage(run: Path, name: str) -> report.Stage:
    return next(stage for stage in report.read(run).stages if stage.name == name)


class Tags(HTMLParser):
    """Which tags a page opens, whether each is closed, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        assert not {name for name, _ in attrs} & {"src", "srcset", "onload", "onclick"}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_finished_stage(run):
    sft(run)
    told = report.read(run)
    assert dict(told.facts) == {
        "recipe": "pipeline.rlhf", "target": "1 node x 4 a6000-48g, 48.0 GiB each", "seed": "42",
        # 238 events, 10 s apart: 39 min 30 s
        "begun": "2027-01-15 08:00 UTC", "last written": "2027-01-15 08:39 UTC",
    }  # fmt: skip
    assert told.versions == [("rlhfdsl", "0.1.0"), ("torch", "2.11.0"), ("python", "3.11.7")]
    found = told.stages[0]
    assert (found.state, found.done, found.of, found.unit) == ("finished", 234, 234, "update")
    assert (found.seconds, found.memory, found.resumes, found.detail) == ("4.2 m", "3.00 GiB", [120], [])
    assert found.evaluation == report.Table(
        ["", "before", "after"], [["loss", "2.25", "1.125"], ["perplexity", "9.488", "3.08"]], "588 rows"
    )
    predicted = PLAN["stages"][0]
    assert found.truth.rows == [
        # 14350043136 bytes are 13.36 GiB, 4.45 times the 3 of the end; 0.6494 s are 30% more than 0.5 s
        ["in all, GiB at most", "13.4", "3.00", "+345%"], ["in all, s for each update", "0.649", "0.500", "+30%"],
    ]  # fmt: skip
    assert predicted["memory"]["peak"] == 14350043136 and predicted["time"]["each"]["train"] == 0.6494
    loss, *more = found.panels
    assert [series.name for series in loss.series] == ["training", "held out"]
    assert loss.series[0].points[100] == (101, None) and loss.series[1].points == [(0, 2.25)]
    assert [panel.title for panel in more] == [
        "Learning rate", "Gradient norm", "Tokens a second", "TFLOP/s of each device"
    ]
    assert [(s.state, s.panels) for s in told.stages[1:]] == [("not begun", ())] * 2


def test_a_stage_that_learns_from_its_own_answers(run):
    averaged = {"ema_eval_score": 0.5, "ema_eval_win_rate": 0.75}
    home = ppo(run / "ppo", evaluation={"eval_score": 0.75, "eval_win_rate": 0.875, "eval_prompts": 32, **averaged})
    rows = [{"prompt": f"{n}", "before": "a", "after": "b", "score_before": -1, "score_after": 2.5} for n in range(32)]
    jsonl(home / "answers.jsonl", rows)
    found = stage(run, "ppo")
    assert found.evaluation.head == ["", "before", "after", "averaged weights"]
    assert found.evaluation.rows == [
        ["score", "-0.5", "0.75", "0.5"], ["KL to the reference, nats an answer", "0", "-", "-"],
        ["win rate against the first policy", "-", "87.5 %", "75.0 %"],
    ]  # fmt: skip
    (seconds,) = [panel for panel in found.panels if panel.stacked]
    assert [(s.name, s.points[0]) for s in seconds.series] == [
        ("generate", (1, 2.0)), ("score", (1, 1.0)), ("train", (1, 5.0))
    ]  # fmt: skip
    titles = [panel.title for panel in found.panels]
    assert "Parity: rollout against training, nats a token" in titles and "Explained variance of the values" in titles
    assert "KL coefficient" not in titles  # which stayed 0.05
    assert (len(found.answers), found.prompts) == (report.ANSWERS, 32)
    assert found.answers[0] == report.Asked("0", [report.Answer("a", "-1.00"), report.Answer("b", "+2.50")])
    assert [(asked.number, asked.answers[0].text) for asked in found.samples] == [
        (10, "answer 10"), (10, "answer 10"), (30, "answer 30")
    ]  # fmt: skip


def test_a_stage_that_runs_and_one_that_was_stopped(run):
    sft(run)
    home = ppo(run / "ppo.partial")
    write(run / "reward", [], evaluation={})
    with (run / ".running").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = stage(run, "ppo")
        assert (found.state, found.done, found.of, found.unit) == ("running", 60, 118, "rollout")
        assert found.seconds == "10 m"  # 62 steps of 10 s between its events
        assert found.evaluation.rows[0] == ["score", "-0.5", "0.75"]
        assert found.evaluation.note == "32 prompts; after 60 rollouts"
    found = stage(run, "ppo")
    assert (found.state, found.detail) == ("stopped", ["It broke off; its output is in ppo.partial/log.txt."])
    with (home / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "stopped", "time": BEGUN, "update": 60, "of": 118, "saved": True}) + "\n{")
    assert stage(run, "ppo").detail == ["It was stopped after 60 of 118, with a checkpoint."]
    assert stage(run, "reward").detail == ["There are no metrics of this stage."]


def test_a_stage_that_failed_says_of_what(run):
    ranks = write(run / "sft.partial", [{"event": "start"}]) / "ranks"
    ranks.mkdir()
    error = {"rank": 1, "doing": "policy: backward", "peer": False, "code": "E0790", "at": None, "place": None}
    (ranks / "1.error.json").write_text(json.dumps(error | {"help": None, "message": "the device ran out of memory"}))
    assert stage(run, "sft").detail == [
        "It broke off: stage.sft, rank 1: the device ran out of memory (E0790); its output is in sft.partial/log.txt."
    ]


def test_a_stage_of_another_plan_says_so(run):
    write(run / "sft", [{"event": "start"}], evaluation={}, key="sha256:other")
    assert stage(run, "sft").detail == ["It was made by another plan than the one that lies in the run's folder now."]


def test_the_page(capsys, run, tmp_path):
    sft(run)
    home = ppo(run / "ppo", evaluation={"eval_score": 0.75})
    answer = {"before": "b" * 2000, "after": "</td></table>", "score_before": None, "score_after": 1.0}
    jsonl(home / "answers.jsonl", [{"prompt": EVIL} | answer])
    code, out, err = rlhf(capsys, "report", run)
    assert (code, out) == (0, "") and err.startswith(f"{run / 'report.html'}  ")
    page = (run / "report.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert tags.open == [] and "script" not in tags.seen and {"svg", "details", "table"} <= tags.seen
    assert r"<script>alert(1)</script>\x1b[31m\u202e& \ud800" in tags.text
    assert "</td></table>" in tags.text and "(2 000 characters)" in tags.text
    assert "default-src 'none'" in page and not re.findall(r"https?://|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert "went on from a checkpoint after 120 updates" in tags.text
    assert len(page.encode()) < 200_000
    assert rlhf(capsys, "report", run, "-o", tmp_path / "x.html")[0] == 0
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == page


def test_a_page_needs_no_torch(run):
    sft(run)
    code = (
        "import sys; from rlhfdsl.cli.main import main; code = main(sys.argv[1:]);"
        "sys.exit(code or bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, "report", str(run)], capture_output=True).returncode == 0


def test_long_runs_make_small_pages(run):
    ppo(run / "ppo", rollouts=5_000, evaluation={})
    assert len(report.page(report.read(run)).encode()) < 500_000


def test_what_is_no_run_or_damaged_is_one_diagnostic(capsys, run, tmp_path):
    def refused(folder, *words):
        code, out, err = rlhf(capsys, "report", folder)
        assert (code, out, err.count("error[")) == (1, "", 1) and "bug" not in err, err
        assert all(word in err for word in ("E0720", *words)), err

    sft(run)
    refused(tmp_path, "is not a run", "runs/quickstart")
    refused(run / "sft", "is not a run", f"it lies in a run: give `{run}`")
    with (run / "sft" / "metrics.jsonl").open("a") as file:
        file.write("{]\n")
    refused(run, "a line of the metrics is damaged", "metrics.jsonl:239")  # after 238 events
    sft(run)
    jsonl(run / "sft" / "answers.jsonl", [{"prompt": "half"}])
    refused(run, "a line of the texts is damaged", "answers.jsonl:1")
    (run / "sft" / "answers.jsonl").unlink()
    for values in ({"update": "third"}, {"update": 1, "loss": "low"}, {"update": 1, "seconds": []}, {"time": 1e300}):
        write(run / "sft", [{"event": "update", **values}], evaluation={})
        refused(run, "the record of stage.sft cannot be read")
    for values in ({"evaluation": {"eval_loss": "low"}}, {"evaluation": None}, {"evaluation": {}, "versions": 3}):
        write(run / "sft", [{"event": "start"}], **values)
        refused(run, "the record of stage.sft cannot be read")
    sft(run)
    (run / "sft" / "result.json").write_text("{")
    refused(run, "the result.json of stage.sft cannot be read")
    (run / "plan.json").write_text(json.dumps(PLAN | {"stages": 3}))
    refused(run)
    (run / "plan.json").write_bytes(b"\xff")
    refused(run, "the plan of the run is damaged")
