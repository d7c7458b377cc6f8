"""A stage whose reward comes from an HTTP endpoint that fails in the middle of it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from pipeline import plan, run_here, write_recipe

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.running.metrics import read_metrics

RECIPE = """
recipe "remote" { language = 1, seed = 3 }
model tiny { arch = llama, layers = 2, hidden = 32, heads = 4, kv_heads = 2, dtype = fp32 }
data pairs { from = "./pairs.jsonl", format = preference }
scorer remote { url = "URL" }
parallel shard { zero = 0, micro = 2 }
stage rloo {
  data = data.pairs, rollouts = 3
  actor { model = model.tiny, lr = 1e-3, parallel = parallel.shard }
  reward { call = scorer.remote }
  rollout { batch = 2, answers = 2, prompt = 64, answer = 4 }
  update { minibatch = 4 }
  kl { coef = 0.05 }
  every { log = 1, checkpoint = 1 }
}
"""


class Scores(BaseHTTPRequestHandler):
    """Gives an answer its length; the number `down` counts the calls until one is refused."""

    down = 0

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).down -= 1
        self.send_response(503 if self.down == 0 else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"scores": [float(len(text)) for text in asked["answers"]]}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = HTTPServer(("127.0.0.1", 0), Scores)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/score"
    server.shutdown()


def updates(folder):
    events = [event for event in read_metrics(folder / "metrics.jsonl") if event["event"] == "update"]
    return [{k: v for k, v in event.items() if k != "time" and "second" not in k} for event in events]


def test_a_run_goes_on_after_an_endpoint_that_failed(tmp_path, monkeypatch, url):
    path = write_recipe(tmp_path, RECIPE.replace("URL", url))
    monkeypatch.chdir(tmp_path)
    run_here(plan(path, 'recipe.output="whole"'), tmp_path)
    Scores.down = 3
    with pytest.raises(UserError) as raised:
        run_here(plan(path), tmp_path)
    assert (raised.value.code, raised.value.at) == ("E0742", "scorer.remote")
    assert raised.value.message == f"POST {url} answered 503 Service Unavailable"
    run_here(plan(path), tmp_path)
    stage = tmp_path / "runs" / "remote" / "rloo"
    assert [e["update"] for e in read_metrics(stage / "metrics.jsonl") if e["event"] == "resume"] == [2]
    assert updates(stage) == updates(tmp_path / "whole" / "rloo") and len(updates(stage)) == 3
