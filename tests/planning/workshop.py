"""Recipes as text to plans, with facts made up where a test needs rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhfdsl.language import Diagnostic, Recipe, load, render
from rlhfdsl.planning import compile, lock
from rlhfdsl.planning.hardware import MIB, Target
from rlhfdsl.planning.rates import Rates

CPU = Target("cpu", None, None, 1, 1, "detected")
HEAD = 'recipe "t" { seed = 1 }\n'
TINY = "model tiny { arch = llama, layers = 2, hidden = 32, heads = 4, dtype = fp32 }\n"
PAIRS = 'data pairs { from = "./pairs.jsonl", format = preference }\n'
PIPELINE = (
    HEAD
    + TINY
    + PAIRS
    + """blend chat {
  mix { pairs = 100% }
  split { sft = 30%, reward = 30%, ppo = 30%, eval = 10% }
}
stage sft {
  model = model.tiny, data = blend.chat, eval = blend.chat.eval, batch = 16, length = 128, lr = 1e-3
}
stage reward {
  model = stage.sft, data = blend.chat, eval = blend.chat.eval, batch = 8, length = 128, lr = 1e-3
}
stage ppo {
  data = blend.chat
  actor { model = stage.sft, lr = 1e-4 }
  critic { model = stage.reward, lr = 1e-4 }
  reward { model = stage.reward }
  rollout { batch = 32, prompt = 64, answer = 64 }
  update { minibatch = 16, epochs = 2 }
  kl { coef = 0.05 }
}
"""
)


def gpus(count: int, gib: int | None = 80, nodes: int = 1) -> Target:
    """`count` devices of `gib` GiB on each of `nodes`."""
    return Target("cuda", "a100-80g", None if gib is None else gib * 1024 * MIB, nodes, count, "--gpus")


def rates_of(monkeypatch, **changed: float) -> None:
    """Give every target round rates; what is not given of products, memory and launches takes no time."""
    given = {"matmul": 1e22, "train": 1.0, "copy": 1e22, "link": 1e11, "network": 1e10, "host": 1e10, "decode": 1e-3,
             "forward": 0.0, "price": None, "origin": "a test"}  # fmt: skip
    rates = Rates(**given | changed)
    monkeypatch.setattr(Target, "rates", lambda self, dtype: rates)


def edge_facts(used: int, rows: int | None = None, **dropped: int) -> dict[str, Any]:
    """EDGEFACTS with the given counts."""
    return {
        "rows": used if rows is None else rows,
        "used": used,
        "tokens": 100 * used,
        "truncated": 3,
        "dropped": {"empty": 0, "too_long": 0, "tie": 0, "no_answer": 0} | dropped,
        "sources": {"pairs.jsonl": {"rows": used, "used": used}},
        "lengths": {"max": 127, "mean": 100.0, "p50": 99, "p90": 120, "p99": 126},
        "sample": [
            {"text": "\n\nHuman: Hi\n\nAssistant:", "loss": False},
            {"text": " Hello.<eos>", "loss": True},
        ],
        "files": {},
    }


def model_facts(
    entry: dict[str, Any], tokenizer: str = "sha256:aa", template: str = "sha256:bb"
) -> dict[str, Any]:
    """MODELFACTS of a model from scratch or of an unknown shape."""
    names = ("type", "layers", "hidden", "heads", "kv_heads", "intermediate", "vocab", "context", "tied")
    arch = entry["arch"] or dict.fromkeys(names)
    return {
        **{name: arch[name] for name in names},
        "parameters": None,
        "tokenizer": tokenizer,
        "template": template,
        "template_name": "human_assistant",
        "pad_id": 0,
        "stop_ids": [2],
        "pad_is_eos": False,
        "files": {},
    }


class Workshop:
    """Compiles recipes; `lock` is filled by `know`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = lock.empty()
        self.sources: Any = {}

    def recipe(self, text: str) -> Recipe:
        path = self.folder / "t.rlhf"
        path.write_text(text, encoding="utf-8")
        compilation = load(path)
        self.sources = compilation.sources
        assert compilation.recipe is not None, render(compilation.diagnostics, compilation.sources, False)
        return compilation.recipe

    def know(self, text: str, rows: int | dict[str, int], target: Target = CPU) -> None:
        """Lock facts for every edge (`rows` used, or by edge address) and every model of a recipe."""
        plan = self.plan(text, target)
        for address, edge in lock.edges(plan):
            used = rows if isinstance(rows, int) else rows[address]
            self.lock["edges"][edge["key"]] = edge_facts(used)
        for entry in plan["models"].values():
            self.lock["models"][entry["key"]] = model_facts(entry)

    def compile(
        self, text: str, target: Target = CPU
    ) -> tuple[dict[str, Any] | None, tuple[Diagnostic, ...]]:
        return compile(self.recipe(text), self.lock, target)

    def plan(self, text: str, target: Target = CPU) -> dict[str, Any]:
        """The plan of a recipe that has no error."""
        plan, found = self.compile(text, target)
        assert plan is not None, render(found, self.sources, False)
        return plan

    def problem(self, text: str, target: Target = CPU) -> Diagnostic:
        """The one error of a recipe."""
        plan, found = self.compile(text, target)
        errors = [d for d in found if d.severity == "error"]
        assert plan is None and len(errors) == 1, render(found, self.sources, False)
        return errors[0]

    def text_at(self, diagnostic: Diagnostic) -> str:
        """The piece of the recipe under a diagnostic's primary span."""
        span = diagnostic.span
        assert span is not None
        return (self.folder / "t.rlhf").read_text(encoding="utf-8")[span.start : span.end]
