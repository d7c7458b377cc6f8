"""`rlhf bench truth`: what plans predict beside what this device does, over a grid of small runs.

A configuration is a recipe of one stage: models of real shapes with random weights made on the device (nothing is
downloaded), rows that fill their length, a few updates in a process of its own. One that runs out of memory is a row
that says so.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhfdsl.cli.common import OK, fail, say
from rlhfdsl.cli.planned import TARGET, make_plan, positive
from rlhfdsl.planning import catalog, hardware, measured

Json = dict[str, Any]
PATIENCE = 5  # a process may take so many times its box, for its imports and its models
_WORDS = ("sun", "moon", "river", "stone", "green", "field", "seven", "never", "under", "house", "light", "water")
_SHAPES = {
    "125m": "facebook/opt-125m", "0.5b": "Qwen/Qwen2.5-0.5B", "1b": "meta-llama/Llama-3.2-1B",
    "1.3b": "facebook/opt-1.3b", "1.5b": "Qwen/Qwen2.5-1.5B", "2.7b": "facebook/opt-2.7b",
    "3b": "meta-llama/Llama-3.2-3B", "6.7b": "facebook/opt-6.7b", "7b": "Qwen/Qwen2.5-7B",
    "30b": "facebook/opt-30b", "350m": "facebook/opt-350m",
    "8b": "meta-llama/Llama-3.1-8B", "13b": "facebook/opt-13b", "66b": "facebook/opt-66b",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration. other: the shape of critic and reward model. batch: of an update, `prompts` of a rollout.
    mixed: rows of the lengths of conversations, not all of `length`."""

    stage: str
    model: str
    other: str = ""
    zero: int = 1
    checkpointing: bool = False
    lora: int = 0
    base: str = "full"  # of the adapters
    offload: str = "off"
    tensor: int = 1  # ranks that sample from shards of one copy
    batch: int = 32
    micro: int = 8
    length: int = 512
    dtype: str = "bf16"
    mixed: bool = False
    packing: bool = True

    @property
    def name(self) -> str:
        words = [self.stage, self.model + (f"+{self.other}" if self.other else ""), f"zero{self.zero}"]
        words += [f"batch{self.batch}"] if (self.stage == "ppo" or self.mixed) and self.batch != 32 else []
        words += [f"offload-{self.offload}"] if self.offload != "off" else []
        words += [f"tensor{self.tensor}"] if self.tensor > 1 else []
        words += ["ckpt"] if self.checkpointing else []
        words += [f"lora{self.lora}"] if self.lora else []
        words += [self.base] if self.base != "full" else []
        words += ["mixed"] if self.mixed else []
        words += ["padded"] if not self.packing else []
        return "-".join(words)


_SFT, _REWARD, _PPO = Case("sft", "125m"), Case("reward", "125m", batch=16, micro=4), Case("ppo", "125m", "125m")
# Rows of unequal lengths, which run without their padding, and beside each the same with it.
_MIXED = (
    replace(_SFT, mixed=True, micro=16),
    replace(_SFT, mixed=True, model="1b", batch=64, micro=16),
    replace(_SFT, mixed=True, model="1.3b", batch=16),
    replace(_SFT, mixed=True, model="1.3b", batch=64, micro=16),
    replace(_SFT, mixed=True, model="1.3b", batch=64, checkpointing=True, micro=16),
    replace(_REWARD, mixed=True, model="1.3b", batch=32),
)
GRID = (
    replace(_SFT, micro=16, batch=64),
    replace(_SFT, model="0.5b"),
    replace(_SFT, model="1.3b"),
    replace(_SFT, model="1.3b", checkpointing=True),
    replace(_SFT, model="1.3b", zero=2),
    replace(_SFT, model="1.3b", zero=3),
    replace(_SFT, model="1b", checkpointing=True, micro=16),
    replace(_SFT, model="2.7b", checkpointing=True, batch=16),
    replace(_SFT, model="3b", checkpointing=True, batch=16),
    replace(_SFT, model="3b", lora=16, batch=16),
    replace(_SFT, model="6.7b", lora=16, checkpointing=True, batch=16),
    replace(_SFT, model="8b", lora=16, checkpointing=True, batch=16, micro=4),
    replace(_SFT, model="13b", lora=16, checkpointing=True, batch=16, micro=4),
    replace(_SFT, model="1.3b", zero=2, offload="optimizer", checkpointing=True, batch=16),
    replace(_REWARD, micro=8),
    replace(_REWARD, model="1.3b"),
    replace(_REWARD, model="1.3b", checkpointing=True),
    replace(_REWARD, model="1.5b", checkpointing=True),
    replace(_REWARD, model="7b", lora=16, checkpointing=True, batch=8, micro=2),
    _PPO,
    replace(_PPO, model="1.3b"),
    replace(_PPO, model="1.3b", checkpointing=True),
    replace(_PPO, model="1.3b", zero=3),
    replace(_PPO, model="1.3b", other="1.3b", checkpointing=True),
    replace(_PPO, model="6.7b", lora=16, checkpointing=True, micro=4),
    *(replace(case, packing=packing) for case in _MIXED for packing in (True, False)),
)  # fmt: skip
# One iteration of 256 + 256 tokens: DeepSpeed-Chat's first row, a grouped-query model, and the largest actors of one
# 80 GB GPU.
PPO = (
    replace(_PPO, model="1.3b", other="350m", batch=128, micro=16),
    replace(_PPO, model="1.3b", other="350m", batch=16, micro=16),
    replace(_PPO, model="1b", other="1b", batch=128, micro=8),
    replace(_PPO, model="13b", other="350m", lora=16, checkpointing=True, batch=32, micro=4),
    replace(_PPO, model="30b", other="350m", lora=16, checkpointing=True, batch=8, micro=2),
    replace(_PPO, model="1.3b", other="350m", lora=16, base="nf4", batch=16, micro=8),
    replace(_PPO, model="13b", other="350m", lora=16, base="nf4", checkpointing=True, micro=4),
    replace(_PPO, model="66b", other="350m", lora=16, base="nf4", checkpointing=True, batch=8, micro=8),
)
# The first of them as several ranks can have it, and with a batch for each of two.
SPREAD = (
    replace(PPO[0], zero=2),
    replace(PPO[0], zero=3),
    replace(PPO[0], zero=3, tensor=2),
    replace(PPO[0], zero=2, batch=256),
    replace(PPO[0], zero=3, batch=256),
    replace(PPO[0], zero=3, tensor=2, batch=256),
)
TINY = (
    Case("sft", "tiny", zero=0, batch=4, micro=2, length=64, dtype="fp32"),
    Case("reward", "tiny", zero=0, batch=4, micro=2, length=64, dtype="fp32"),
    Case("ppo", "tiny", "tiny", zero=0, batch=4, micro=2, length=64, dtype="fp32"),
    Case("ppo", "tiny", "tiny", zero=0, lora=4, base="nf4", batch=4, micro=2, length=64, dtype="fp32"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments that only `rlhf bench truth` has."""
    truth = parser.add_argument_group("truth")
    truth.add_argument("--only", nargs="+", metavar="WORD", help="configurations whose names hold one of these words")
    truth.add_argument("--list", action="store_true", help="name the configurations")
    truth.add_argument("--seconds", type=float, default=20.0, metavar="S", help="for each (default: 20)")
    truth.add_argument("--updates", type=positive, default=5, metavar="N", help="of each at most (default: 5)")
    truth.add_argument("--gpu", metavar="NAME", help="plan with the rates of this GPU or profile (default: detected)")


def run(args: argparse.Namespace) -> int:
    """Measure the grid and print the table; `-o FILE` has it after each row, with FILE's .json beside it."""
    here = hardware.detect()
    device = args.device or here.device
    args.ranks = args.ranks or 1
    if device == here.device == "cuda" and args.ranks > here.gpus:
        fail(f"--ranks {args.ranks}: this machine has {here.gpus} GPUs")
    grid = PPO if args.what == "ppo" else (*GRID, *PPO)
    if args.ranks > 1:
        grid = (*grid, *SPREAD)
    if device == "cpu":
        grid = TINY[2:] if args.what == "ppo" else TINY
    cases = [case for case in grid if not args.only or _named(case, args.only)]
    if not cases:
        fail("no configuration has such a name; `rlhf bench truth --list` names them")
    if args.list:
        print("\n".join(case.name for case in cases))
        return OK
    results: list[Json] = []
    for number, case in enumerate(cases, 1):
        say(f"{number} of {len(cases)}: {case.name}")
        found = measure(case, device, args)
        results.append(found)
        say(f"   {told(found)}")
        if args.output is not None:
            args.output.write_text(table(results), encoding="utf-8")
            args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1) if args.format == "json" else table(results), end="")
    return OK


def _named(case: Case, words: list[str]) -> bool:
    return any(word in case.name for word in words)


def measure(case: Case, device: str, args: argparse.Namespace) -> Json:
    """A configuration planned, run and compared: {"name", "error"} or also {"plan", "measured", "rows"}."""
    name = case.name if args.ranks == 1 else f"{case.name}-ranks{args.ranks}"
    with tempfile.TemporaryDirectory(prefix="rlhf-truth-") as scratch:
        folder = Path(scratch)
        (folder / "truth.rlhf").write_text(recipe(case), encoding="utf-8")
        (folder / "rows.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows(case, case.batch * (args.updates + 1))), encoding="utf-8"
        )
        options: Json = {"param": [], "profile": None, "sets": []} | dict.fromkeys(TARGET)
        options |= {"gpu": args.gpu or ("cpu" if device == "cpu" else None), "gpus": args.ranks}
        planned = make_plan(argparse.Namespace(file=folder / "truth.rlhf", **options))
        if planned.plan is None:
            first = next(d for d in planned.diagnostics if d.severity == "error")
            return {"name": name, "error": f"not planned: {first.message}"}
        (folder / "plan.json").write_text(json.dumps(planned.plan), encoding="utf-8")
        (stage,) = planned.plan["stages"]
        found = _child(folder, stage["address"], device, args)
    if "error" in found:
        return {"name": name, "error": found["error"], "predicted": stage["memory"]["peak"]}
    what = measured.Measured(found["peak"], found["peaks"], found["seconds"])
    compared = [[row.phase, row.unit, row.predicted, row.measured] for row in measured.rows(stage, what)]
    if found.get("gather") is not None:
        compared += [["gather, of generate", "GiB", None, None], ["gather, of generate", "s", None, found["gather"]]]
    planned_as = {"memory": stage["memory"], "time": stage["time"], "target": planned.plan["target"]}
    return {"name": name, "plan": planned_as, "measured": found, "rows": compared}


def _child(folder: Path, stage: str, device: str, args: argparse.Namespace) -> Json:
    """What the first rank measured, or {"error": why not}; ranks that hang are ended."""
    from rlhfdsl.running import launcher

    worker = ["rlhfdsl.running.truth", "--plan", str(folder / "plan.json"), "--stage", stage]
    worker += ["--updates", str(args.updates), "--seconds", str(args.seconds)]
    limit = 60 + PATIENCE * args.seconds
    command, environment = launcher.on_this_node(device, args.ranks, worker)
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True, preexec_fn=launcher.die_with_parent,
    ) as process:  # fmt: skip
        try:
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {limit:.0f} s"}
        finally:
            launcher.stop(process)
    try:
        found: Json = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    except OSError:
        last = (errors.strip().splitlines() or ["no output"])[-1]
        return {"error": f"exit {process.returncode}: {last[:200]}"}
    if "error" in found and found["error"] != "out of memory":
        say(errors[-2000:])
    return found


# ---- a configuration as a recipe


def recipe(case: Case) -> str:
    """The recipe of a configuration."""
    parallel = f"zero = {case.zero}, micro = {case.micro}"
    parallel += f", gradient_checkpointing = {'on' if case.checkpointing else 'off'}, offload = {case.offload}"
    parallel += "" if case.packing else ", packing = off"
    if case.dtype == "fp32":
        parallel = f"micro = {case.micro}"
    lora = f", lora {{ rank = {case.lora}, base = {case.base} }}" if case.lora else ""
    engine = f"lr = 1e-6, parallel = parallel.p{lora}"
    out = f'recipe "truth" {{ output = "truth" }}\nparallel p {{ {parallel} }}\n'
    out += f'data rows {{ from = "./rows.jsonl", format = {_FORMATS[case.stage]} }}\n'
    out += _model("base", case, case.model)
    if case.stage != "ppo":
        loss = ", loss = all" if case.stage == "sft" else ""
        return out + (
            f"stage {case.stage} {{ model = model.base, data = data.rows, epochs = 1, batch = {case.batch}"
            f", length = {case.length}{loss}, every {{ log = 1 }}, {engine} }}\n"
        )
    half = case.length // 2
    tensor = f", tensor = {case.tensor}" if case.tensor > 1 else ""
    return (
        out + _model("judge", case, case.other, ", head = scalar") + "stage ppo {\n  data = data.rows\n"
        f"  actor {{ model = model.base, {engine} }}\n"
        f"  critic {{ model = model.judge, lr = 1e-6, parallel = parallel.p }}\n"
        f"  reward {{ model = model.judge }}\n"
        f"  rollout {{ batch = {case.batch}, prompt = {half}, answer = {half}{tensor} }}\n"
        f"  update {{ minibatch = {case.batch} }}\n  kl {{ coef = 0.05 }}\n}}\n"
    )


_FORMATS = {"sft": "text", "reward": "preference", "ppo": "prompt"}


def _model(name: str, case: Case, shape: str, more: str = "") -> str:
    """A model block with the numbers of a model of the catalog, and the byte tokenizer."""
    if shape == "tiny":
        numbers: Json = {"type": "llama", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 4, "intermediate": 128}
        numbers |= {"vocab": 512, "context": 512, "tied": True}
    else:
        found = catalog.lookup(_SHAPES[shape])
        assert found is not None
        numbers = found
    names = ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab", "context")
    said = ", ".join(f"{key} = {numbers[key]}" for key in names)
    tied = "on" if numbers["tied"] else "off"
    return f"model {name} {{ arch = {numbers['type']}, {said}, tied = {tied}, dtype = {case.dtype}{more} }}\n"


def rows(case: Case, count: int) -> Iterator[Json]:
    """Rows of English words, a byte of them a token of the byte tokenizer: they fill the length of a stage, or
    have half of them under 121 tokens and a deviation of 120, much as the conversations of Anthropic's hh-rlhf."""
    draw = random.Random(7)

    def length() -> int:
        return max(16, min(case.length, int(draw.lognormvariate(4.8, 0.8)))) if case.mixed else case.length

    def words(size: int) -> str:
        text = ""
        while len(text) < size:
            text += draw.choice(_WORDS) + " "
        return text[:size].rstrip().ljust(size, "s")

    turns = len("\n\nHuman: \n\nAssistant: ") + 2  # and the first and the last token
    for _ in range(count):
        if case.stage == "sft":
            yield {"text": words(length() - 2 if case.mixed else 2 * case.length)}
        elif case.stage == "reward":
            prompt = case.length // 4 if not case.mixed else 32
            chosen, rejected = (max(length() - prompt - turns, 1) for _ in range(2))
            yield {"prompt": words(prompt), "chosen": words(chosen), "rejected": words(rejected)}
        else:
            yield {"prompt": words(case.length // 2 - turns + 2)}  # which ends behind "Assistant:"


# ---- the table


def told(found: Json) -> str:
    """A result in a line."""
    if "error" in found:
        return str(found["error"])
    compared = [measured.Row(*row) for row in found["rows"]]
    return "; ".join(
        f"{row.unit} predicted {a}, measured {b} ({off})"
        for row in compared if not row.phase for a, b, off in [measured.cells(row)]
    )  # fmt: skip


def table(results: list[Json]) -> str:
    """Two tables in Markdown: the whole of each configuration, and its phases where it has several."""
    head = ("configuration", "GiB predicted", "measured", "off by", "s predicted", "measured", "off by")
    whole, phases = [], []
    for found in results:
        if "error" in found:
            whole.append([found["name"], found["error"], *["-"] * 5])
            continue
        compared = [measured.Row(*row) for row in found["rows"]]
        by: dict[str, list[str]] = {}
        for row in compared:
            by.setdefault(row.phase, []).extend(measured.cells(row))
        whole.append([found["name"], *by.pop("")])
        phases += [[f"{found['name']}: {phase}", *line] for phase, line in by.items()]
    out = measured.markdown(head, whole)
    return out + ("\n" + measured.markdown(("phase", *head[1:]), phases) if phases else "")
