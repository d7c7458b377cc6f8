"""Batches as the plan cuts them, at their places in the text."""

from __future__ import annotations

from rlhfdsl.language import load
from rlhfdsl.lsp.derived import batches

RECIPE = """recipe "x" { }
CLUSTER
model base { from = "facebook/opt-125m" }
data rows { from = "./rows.jsonl", format = preference }
parallel p { zero = 1, micro = 4 }
stage sft { model = model.base, data = data.rows, batch = 64, length = 128, lr = 1e-3, parallel = parallel.p }
stage reward { model = model.base, data = data.rows, batch = 64, length = 128, lr = 1e-3, parallel = parallel.p }
stage ppo {
  data = data.rows
  actor { model = stage.sft, lr = 1e-6, parallel = parallel.p }
  critic { model = stage.reward, lr = 1e-6, parallel = parallel.p }
  reward { model = stage.reward }
  rollout { batch = 32, answers = 2, prompt = 64, answer = 64 }
  update { minibatch = 32 }
  kl { coef = 0.1 }
}
"""


def hints(tmp_path, cluster: str) -> list[str]:
    path = tmp_path / "t.rlhf"
    text = RECIPE.replace("CLUSTER", cluster)
    path.write_text(text)
    return [text[:offset].rpartition(" ")[2] + hint for offset, hint in batches(path.as_posix(), load(path))]


def test_beside_the_numbers(tmp_path):
    # 64 = 4 GPUs x 16 = 4 x micro 4 x 4; 32 prompts = 4 x 8; 32 = 4 x micro 4 x 2
    assert hints(tmp_path, 'cluster c { gpus = 4, gpu = "a100-80g" }') == [
        "64 = 4 GPUs x micro 4 x 4",
        "64 = 4 GPUs x micro 4 x 4",
        "32 = 4 GPUs x 8 prompts x 2 answers",
        "32 = 4 GPUs x micro 4 x 2",
    ]


def test_without_a_cluster_or_a_plan(tmp_path):
    assert hints(tmp_path, "") == []
    assert hints(tmp_path, 'cluster c { gpus = 3, gpu = "a100-80g" }') == []  # 64 does not split over 3
    assert hints(tmp_path, 'cluster c { gpus = 4, gpu = "nonsense" }') == []
