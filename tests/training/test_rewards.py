"""Scores from functions, endpoints and sums of them, and one message for each way to be wrong."""

import json
import math
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import lock
from rlhfdsl.training.experience import Answers, Experience, answer_mask
from rlhfdsl.training.onpolicy import OnPolicy
from rlhfdsl.training.rewards import TextReward, Weighted, endpoint, function_of


def decode(ids):
    return "".join(map(chr, ids))


def answers(*texts):
    """Answers to the prompt "p:"."""
    rows = [[ord(c) for c in "p:" + text] for text in texts]
    ids = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    prompt_lengths = torch.full_like(lengths, 2)
    mask = answer_mask(prompt_lengths, lengths)
    return Answers(ids=ids, prompt_lengths=prompt_lengths, lengths=lengths, ended=lengths > 0, mask=mask,
                   rollout_log_probs=mask.float())  # fmt: skip


def test_a_function_reads_texts_and_a_sum_weighs_its_terms():
    def length(prompts, texts):
        assert prompts == ["p:", "p:"]
        return [len(text) for text in texts]

    both = Weighted([
        ("length", 2.0, TextReward("length", length, decode)),
        ("a", -1.0, TextReward("a", lambda _, texts: torch.tensor([float(t.count("a")) for t in texts]), decode)),
    ])  # fmt: skip
    found = answers("aab", "b")
    assert both.terms(found).tolist() == [[3.0, 2.0], [1.0, 0.0]]
    assert both(found).tolist() == [2 * 3 - 2, 2 * 1 - 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "gave 1 scores for 2 answers"),
        (7.0, "gave float, not a list of numbers"),
        (None, "gave NoneType, not a list of numbers"),
        ([1.0, math.nan], "gave nan for answer 1, 'second'"),
        ([1.0, None], "gave None for answer 1, 'second'"),
        (["x", 1.0], "gave 'x' for answer 0, 'first'"),
        ([1.0, "1"], "gave '1' for answer 1, 'second'"),
        ([1e39, 1.0], "gave 1e+39 for answer 0, 'first'"),  # an infinite score in fp32, which a run computes in
        ([10**400, 1.0], f"gave 1{'0' * 79} for answer 0, 'first'"),
        ({0: 0.5, 1: 1.0}, "gave dict, not a list of numbers"),
        ({0.5, 1.0}, "gave set, not a list of numbers"),
    ],
)
def test_a_function_that_gives_something_else(given, message):
    reward = TextReward("`score` of `rewards.py`", lambda prompts, texts: given, decode, at="scorer.mine")
    with pytest.raises(UserError, match="E0743") as raised:
        reward(answers("first", "second"))
    assert raised.value.message == f"`score` of `rewards.py` {message}" and raised.value.at == "scorer.mine"


def test_a_function_that_raises(capsys):
    def score(prompts, texts):
        return [1 / 0 for _ in texts]

    with pytest.raises(UserError, match="E0742") as raised:
        TextReward("`score` of `rewards.py`", score, decode)(answers("first"))
    assert raised.value.message == "`score` of `rewards.py` raised ZeroDivisionError: division by zero"
    assert raised.value.place == f"{__file__}:{score.__code__.co_firstlineno + 1}"
    with pytest.raises(UserError, match="`lazy` raised ZeroDivisionError"):
        TextReward("`lazy`", lambda prompts, texts: (1 / 0 for _ in texts), decode)(answers("first"))
    with pytest.raises(UserError, match="`score` of `rewards.py` raised SystemExit: 3"):
        TextReward("`score` of `rewards.py`", lambda prompts, texts: sys.exit(3), decode)(answers("first"))
    assert "in score" in capsys.readouterr().err  # the traceback, for the log


def test_a_file_is_run_only_as_it_was_planned(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass P:\n"
        "    x: int\n\n\ndef score(prompts, answers):\n    return [P(1).x] * len(answers)\n"
    )
    pins = lock.pin(path)
    assert function_of(path, "score", pins)(["p"], ["a"]) == [1]
    with pytest.raises(UserError, match="defines no function `other`"):
        function_of(path, "other", pins)
    path.write_text(path.read_text().replace("P(1)", "P(2)"))
    with pytest.raises(UserError, match="is not the file that was planned"):
        function_of(path, "score", pins)
    path.write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="raised ModuleNotFoundError as it was loaded"):
        function_of(path, "score", None)
    path.write_text("import argparse\nargparse.ArgumentParser().parse_args(['rows'])\n")  # a script, not a module
    with pytest.raises(UserError, match="raised SystemExit as it was loaded: 2"):
        function_of(path, "score", lock.pin(path))


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = [float(len(text)) for text in asked["answers"]]
        replies = {"/right": {"scores": scores}, "/short": {"scores": scores[1:]}, "/else": [1]}
        replies["/text"] = {"scores": "x"}
        if self.path == "/late":
            self.server.over.wait(60)  # longer than anybody asks
            return
        self.send_response(500 if self.path == "/broken" else 200)
        if self.path == "/cut":
            self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"<html>" if self.path == "/html" else json.dumps(replies.get(self.path)).encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)  # of threads: the next one asks while one is late
    server.over = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.over.set()
    server.shutdown()
    server.server_close()


def ask(url, timeout=60.0):
    return TextReward(f"POST {url}", endpoint(url, timeout), decode)(answers("first", "second"))


def test_an_endpoint_gives_scores(served):
    assert ask(f"{served}/right").tolist() == [5.0, 6.0]


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("/broken", "E0742", "answered 500 Internal Server Error"),
        ("/late", "E0742", "took longer than 0.3 s"),
        ("/cut", "E0742", "gave no whole answer: IncompleteRead(4 bytes read, 996 more expected)"),
        ("/html", "E0743", "gave b'<html>', not"),
        ("/else", "E0743", "gave b'[1]', not"),
        ("/short", "E0743", "gave 1 scores for 2 answers"),
        ("/text", "E0743", "gave str, not a list of numbers"),
    ],
)
def test_an_endpoint_that_fails_is_named(served, path, code, message):
    with pytest.raises(UserError) as raised:
        ask(served + path, timeout=0.3 if path == "/late" else 60.0)
    assert raised.value.code == code and raised.value.message.startswith(f"POST {served}{path} {message}")


def test_an_endpoint_that_is_not_there():
    with pytest.raises(UserError, match="could not be reached"):
        ask("http://127.0.0.1:1/score")


def scored(*scores, terms=None):
    """An experience of as many answers of one token."""
    zeros = torch.zeros(len(scores), 1)
    return Experience(
        **vars(answers(*"a" * len(scores))), log_probs=zeros, ref_log_probs=zeros, scores=torch.tensor(scores),
        score_terms=terms, rewards=zeros, advantages=zeros,
    )  # fmt: skip


def trainer(reward=None, **settings):
    settings = {"reward": {"overlong": None} | settings}
    return SimpleNamespace(settings=settings, kl_coefficient=0.1, engines=SimpleNamespace(reward=reward))


def test_the_clip_comes_before_what_is_added_for_an_answer_without_an_end():
    four = replace(scored(9.0, -9.0, 2.0, -9.0), ended=torch.tensor([True, True, False, False]))
    assert OnPolicy.shaped(trainer(clip=5.0, missing_eos=-1.0), four).tolist() == [5.0, -5.0, 2.0 - 1, -5.0 - 1]
    assert OnPolicy.shaped(trainer(clip=None, missing_eos=0.0), four).tolist() == [9.0, -9.0, 2.0, -9.0]


def test_the_deviation_of_large_scores_that_differ_little():
    # fp32 numbers near 10 000 are 0.001 apart, and their squares 8.
    metrics = OnPolicy.rollout_metrics(trainer(clip=None), scored(10_000.0, 10_000.25))
    assert metrics["score_std"] == pytest.approx(0.125, rel=1e-4)
    assert OnPolicy.rollout_metrics(trainer(clip=None), scored(*[4.7] * 3))["score_std"] < 1e-6


def test_a_term_never_takes_the_name_of_another_metric():
    nothing = TextReward("nothing", lambda prompts, texts: [0.0] * len(texts), decode)
    terms = Weighted([("model", 1.0, nothing), ("std", 1.0, nothing), ("model", 1.0, nothing), ("own", 1.0, nothing)])
    experience = scored(8.0, 12.0, terms=torch.tensor([[1.0, 2.0, 3.0, 2.0], [3.0, 4.0, 5.0, 0.0]]))
    metrics = OnPolicy.rollout_metrics(trainer(terms, clip=None), experience)
    assert (metrics["score"], metrics["score_std"]) == (10.0, 2.0)
    # the means of the four columns
    assert (metrics["score_model"], metrics["score_scorer.std"], metrics["score_scorer.model"]) == (2.0, 3.0, 4.0)
    assert metrics["score_own"] == 1.0
