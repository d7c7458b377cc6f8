"""A recipe of one stage with a little data."""

from __future__ import annotations

import json
from pathlib import Path

RECIPE = """recipe "small" { seed = 3 }
model tiny { arch = llama, layers = 2, hidden = 32, heads = 4, dtype = fp32 }
data pairs { from = "./pairs.jsonl", format = preference }
blend chat {
  mix { pairs = 100% }
  split { sft = 50%, eval = 50% }
}
stage sft {
  model = model.tiny, data = blend.chat, eval = blend.chat.eval
  batch = 4, length = 96, lr = 1e-3
}
"""


def small(folder: Path) -> Path:
    """small.rlhf in `folder`, with 40 pairs beside it; returns the recipe's path."""
    rows = ({"prompt": f"What is {n} + 1?", "chosen": f"{n + 1}", "rejected": "No."} for n in range(40))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "small.rlhf"
    path.write_text(RECIPE)
    return path
