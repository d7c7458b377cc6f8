"""A three-stage recipe that takes seconds, and a way to run its stages in this process.

As a script (`pipeline.py FOLDER GPUS ZERO…`) it runs the pipeline once for each ZeRO stage on the ranks that started
it, so that one launch of two ranks serves every comparison. At stage 3 two ranks sample from shards of one copy. Rows
run without their padding there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

RECIPE = """
recipe "small" {
  language = 1
  seed     = 3
}

model tiny { arch = llama, layers = 2, hidden = 32, heads = 4, kv_heads = 2, dtype = fp32 }
data pairs { from = "./pairs.jsonl", format = preference }
data prose { from = "./prose.jsonl", format = text }

blend all {
  mix { pairs = 100% }
  split { sft = 30%, reward = 30%, ppo = 35%, eval = 5% }
}

parallel shard { zero = 0, micro = 2 }

stage sft {
  model = model.tiny, data = blend.all, eval = blend.all.eval
  steps = 4, batch = 8, length = 96, lr = 3e-3, parallel = parallel.shard
  every { log = 1 }
}

stage reward {
  model = stage.sft, data = blend.all, eval = blend.all.eval
  steps = 3, batch = 4, length = 96, lr = 1e-3, parallel = parallel.shard
  every { log = 1 }
}

stage ppo {
  data = blend.all, eval = blend.all.eval
  rollouts = 3
  actor { model = stage.sft, lr = 1e-3, ema = 0.9, parallel = parallel.shard }
  critic { model = stage.reward, lr = 1e-3, parallel = parallel.shard }
  reward { model = stage.reward }
  rollout { batch = 8, prompt = 64, answer = 8 }
  update { minibatch = 4, epochs = 2 }
  kl { coef = 0.05 }
  ptx { data = data.prose, weight = 0.5, batch = 4 }
  every { samples = 1, eval = 2 }
}
"""

SFT_ONLY = RECIPE[: RECIPE.index("stage reward")].replace("reward = 30%, ppo = 35%", "rest = 65%")

WORDS = ("alder", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "yew")


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """small.rlhf, pairs.jsonl and prose.jsonl in `folder`; returns the recipe's path."""
    rows = [
        {"prompt": f"What is a {a} to a {b}?", "chosen": f"A {a} is a friend.", "rejected": f"{b}? No."}
        for a in WORDS for b in WORDS if a != b
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trees = zip(WORDS, WORDS[3:], WORDS[5:], strict=False)
    prose = [{"text": f"The {a} stood by the {b} and the {c} all winter."} for a, b, c in trees]
    (folder / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prose))
    path = folder / "small.rlhf"
    path.write_text(text)
    return path


def plan(path: Path, *sets: str, gpus: int = 1) -> dict:
    """The plan of a recipe on CPU ranks; the test fails with the diagnostics when there is none."""
    from rlhfdsl.cli.planned import make_plan

    args = argparse.Namespace(
        file=path, sets=list(sets), param=[], profile=None, gpu="cpu", gpus=gpus, nodes=1, price=None, host_memory=None
    )
    planned = make_plan(args)
    assert planned.plan is not None, [d.message for d in planned.diagnostics]
    return planned.plan


def run_here(plan: dict, base: Path) -> None:
    """All stages of a plan on this process's rank, each folder published as the supervisor does; one that stops goes
    on from its checkpoint."""
    from rlhfdsl.engines import distributed
    from rlhfdsl.planning import keys
    from rlhfdsl.running import schedule
    from rlhfdsl.running.worker import run_stage

    distributed.join(plan["target"]["device"])
    for stage in plan["stages"]:
        done = False
        while not done:
            checkpoint = None
            if distributed.rank() == 0:
                action = schedule.decide(plan, stage, keys.stamp(plan, stage), thorough=True)
                checkpoint = schedule.settle(stage, action)
            done = run_stage(plan, stage, base, distributed.from_first(checkpoint)) is not None
        if distributed.rank() == 0:
            os.replace(schedule.partial_of(Path(stage["output"])), stage["output"])
        distributed.barrier()


def run_broken(plan: dict, base: Path, update: int) -> None:
    """The same, with every stage broken off after `update` updates."""
    from rlhfdsl.engines.checkpoint.keeper import Keeper

    agreed = Keeper._agreed
    Keeper._agreed = lambda self, done: (False, done == update and self.resume is None)
    try:
        run_here(plan, base)
    finally:
        Keeper._agreed = agreed


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    folder, gpus, *stages = Path(arguments[0]), int(arguments[1]), *arguments[2:]
    os.chdir(folder)
    from rlhfdsl.planning import cut

    if gpus > 1:
        cut.SPREAD = 0.0  # so that models as small as these run without padding too, other than on one rank
    for zero in stages:
        sets, output = [f"parallel.shard.zero={zero}"], f"runs/{gpus}-{zero}"
        if zero == "3" and gpus > 1:
            sets += [
                f"stage.{stage}.rollout.{setting}" for stage in ("ppo", "adapted")
                for setting in ("engine=graph", f"tensor={gpus}")
            ]  # fmt: skip
        run_here(plan(folder / "small.rlhf", *sets, f'recipe.output="{output}"', gpus=gpus), folder)
        if zero == ("3" if gpus > 1 else "0"):
            broken = plan(folder / "small.rlhf", *sets, f'recipe.output="{output}-broken"', gpus=gpus)
            run_broken(broken, folder, 2)
    from rlhfdsl.engines import distributed

    distributed.barrier()
    os._exit(0)  # as a worker ends: gloo's threads now and then abort a process that is taken down
