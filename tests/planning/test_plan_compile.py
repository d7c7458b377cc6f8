"""Recipe to plan: hand-worked batches, edges, engines, goldens, purity."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from workshop import CPU, HEAD, PAIRS, PIPELINE, TINY, edge_facts, gpus, model_facts

from rlhfdsl.cli.plan import to_json
from rlhfdsl.language import UserError, load, render
from rlhfdsl.planning import catalog, compile, hardware, lock
from rlhfdsl.planning.batches import proves
from rlhfdsl.planning.render import render as plan_text
from rlhfdsl.planning.validate import validate_lock, validate_plan

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted((ROOT / "recipes").glob("*.rlhf"))


def stage(plan, address):
    return next(s for s in plan["stages"] if s["address"] == address)


def sft(settings):
    return HEAD + TINY + PAIRS + f"stage sft {{ model = model.tiny, data = data.pairs, {settings} }}\n"


# ---- batches


def test_sft_on_four_gpus(shop):
    rows = {"stage.sft.train": 1000, "stage.sft.eval": 50}
    text = (
        HEAD + TINY + PAIRS + 'data held { from = "./held.jsonl", format = preference }\n'
        "parallel p { micro = 4, zero = 1 }\n"
        "stage sft { model = model.tiny, data = data.pairs, eval = data.held, epochs = 3, batch = 64,"
        " length = 128, lr = 1e-3, warmup = 10%, parallel = parallel.p }\n"
    )
    shop.know(text, rows, gpus(2, nodes=2))
    plan = shop.plan(text, gpus(2, nodes=2))
    batch, engine = stage(plan, "stage.sft")["batch"], stage(plan, "stage.sft")["engines"]["policy"]
    # 64 = 4 GPUs x micro 4 x accum 4; floor(1000 / 64) = 15 updates in each of 3 epochs, and
    # 1000 - 15 x 64 = 40 rows left over
    assert (batch["world"], batch["per_rank"], batch["micro"], batch["accumulation"]) == (4, 16, 4, 4)
    assert (batch["updates_per_epoch"], batch["updates"], batch["dropped_tail"]) == (15, 45, 40)
    assert engine["schedule"] == {"kind": "cosine", "lr": 1e-3, "warmup": 5, "updates": 45}  # 4.5 rounds up
    assert engine["deepspeed"]["train_batch_size"] == 64
    assert engine["deepspeed"]["gradient_accumulation_steps"] == 4


def test_steps_instead_of_epochs(shop):
    text = sft("steps = 7, batch = 16, length = 128, lr = 1e-3")
    plan = shop.plan(text)
    batch = stage(plan, "stage.sft")["batch"]
    assert (batch["updates"], batch["epochs"], batch["rows"], batch["updates_per_epoch"]) == (
        7,
        None,
        None,
        None,
    )
    shop.know(text, 40)
    assert stage(shop.plan(text), "stage.sft")["batch"]["updates_per_epoch"] == 2


def test_ppo(shop):
    text = PIPELINE.replace("rollout { batch = 32", "rollout { batch = 32, answers = 2")
    text = text.replace("critic { model", "critic { warmup_rollouts = 1, model")
    shop.know(text, 110)
    ppo = stage(shop.plan(text), "stage.ppo")
    batch, engines = ppo["batch"], ppo["engines"]
    # 32 prompts x 2 answers = 64 = 4 minibatches of 16; twice over them: 8 updates;
    # floor(110 / 32) = 3 rollouts
    assert (batch["sequences"], batch["per_rank"], batch["minibatches"]) == (64, 64, 4)
    assert (batch["updates_per_rollout"], batch["rollouts"], batch["updates"]) == (8, 3, 24)
    assert batch["dropped_tail"] == 110 - 96
    assert engines["critic"]["schedule"]["updates"] == 24
    assert engines["actor"]["schedule"]["updates"] == 16  # the critic learns alone for the first rollout
    assert ppo["settings"]["rollouts"] == 3 and ppo["settings"]["kl"]["estimator"] == "k1"
    assert (
        stage(shop.plan(text.replace("coef = 0.05", "coef = 0.05, apply = loss")), "stage.ppo")["settings"][
            "kl"
        ]["estimator"]
        == "k3"
    )


@pytest.mark.parametrize("target", [CPU, gpus(1), gpus(4), gpus(8, 16), gpus(4, nodes=2)])
def test_a_batch_is_the_sum_of_its_micro_batches(shop, target):
    text = PIPELINE + "".join(  # a ptx block and a second sft stage with other numbers
        "stage sft other { model = model.tiny, data = blend.chat.sft, batch = 48, length = 100, lr = 1e-3 }\n"
    )
    for planned in shop.plan(text, target)["stages"]:
        for engine in planned["engines"].values():
            whole = engine["deepspeed"]["train_batch_size"]
            assert proves(whole, target.world, engine["micro"], engine["accumulation"])
        batch = planned["batch"]
        if planned["kind"] == "ppo":
            assert planned["engines"]["actor"]["deepspeed"]["train_batch_size"] == batch["minibatch"]
            assert batch["per_rank"] * target.world == batch["sequences"]
            assert batch["per_rank"] % batch["generate_per_rank"] == 0
            for name in ("ref", "reward"):
                assert batch["per_rank"] % planned["engines"][name]["micro"] == 0
        else:
            assert whole == batch["batch"]


# ---- placement


def zero_of(plan, address="stage.ppo"):
    return {name: engine["zero"] for name, engine in stage(plan, address)["engines"].items()}


def test_zero_is_derived(shop):
    half = PIPELINE.replace("dtype = fp32", "dtype = bf16")
    assert zero_of(shop.plan(PIPELINE)) == {"actor": 0, "critic": 0, "ref": 0, "reward": 0}
    assert zero_of(shop.plan(half)) == {"actor": 1, "critic": 1, "ref": 0, "reward": 0}
    assert zero_of(shop.plan(PIPELINE, gpus(2))) == {"actor": 1, "critic": 1, "ref": 0, "reward": 0}
    three = half + "parallel three { zero = 3 }\n"
    three = three.replace("lr = 1e-4 }\n  critic", "lr = 1e-4, parallel = parallel.three }\n  critic")
    assert zero_of(shop.plan(three, gpus(2))) == {"actor": 3, "critic": 1, "ref": 3, "reward": 3}


def test_what_is_written_for_training_does_not_bind_inference(shop):
    """ZeRO 1 and 2 shard what an engine that only infers does not have, so its stage is derived."""
    text = PIPELINE + "parallel p { zero = 2, offload = optimizer }\n"
    text = text.replace("model = stage.reward }", "model = stage.reward, parallel = parallel.p }")
    text = text.replace("lr = 1e-4 }\n  critic", "lr = 1e-4, parallel = parallel.p }\n  critic")
    reward = stage(shop.plan(text, gpus(2)), "stage.ppo")["engines"]["reward"]
    assert (reward["zero"], reward["offload"]) == (0, "off")
    assert "optimizer" not in reward["deepspeed"]


BIG = (
    HEAD
    + """model big { from = "facebook/opt-13b" }
data pairs { from = "./pairs.jsonl", format = preference }
parallel p { PARALLEL }
stage sft { model = model.big, data = data.pairs, batch = 64, length = 512, lr = 1e-5, parallel = parallel.p }
"""
)


def test_the_lowest_stage_that_fits(shop):
    """OPT-13B (12.85e9 parameters) on 8 GPUs: bytes by hand at each stage against 90 % of a GPU.

    Checkpointing is written, since a stage that saves it would be taken for its speed.
    """
    text = BIG.replace("PARALLEL", "zero = auto, gradient_checkpointing = on")
    count = 12_853_473_280
    table = 50272 * 5120
    one, two, three = (2 + 4 + 12 / 8) * count + 2 * table, (2 + 16 / 8) * count, 18 / 8 * count + 4 * table
    for gib, expected, states in ((141, 1, one), (80, 2, two), (48, 3, three)):
        planned = stage(shop.plan(text, gpus(8, gib)), "stage.sft")
        assert planned["engines"]["policy"]["zero"] == expected, gib
        assert planned["memory"]["engines"]["policy"]["total"] == pytest.approx(states, rel=1e-9)
        assert planned["memory"]["fits"] and planned["memory"]["peak"] <= 0.9 * gib * 2**30


def test_a_layout_that_barely_fits_is_not_taken(shop):
    """OPT-13B as actor on 8 A100-40G, whole copies to sample from: ZeRO 3 fits and leaves a rollout few sequences at
    once; with states on the host it samples more at once, in a fraction of the time."""
    text = (ROOT / "recipes" / "opt-13b-8gpu.rlhf").read_text(encoding="utf-8")
    text = text.replace("rollout {", "rollout {\n    tensor = 1")
    target = hardware.resolve({"gpu": "a100-40g", "gpus": 8}, None, CPU)
    planned = stage(shop.plan(text, target), "stage.ppo")
    assert planned["engines"]["actor"]["offload"] == "both" and planned["batch"]["generate_per_rank"] == 16
    text += "parallel p { offload = off }\n"
    for name in ("actor", "critic"):
        text = text.replace(f"{name} {{ model", f"{name} {{ parallel = parallel.p, model")
    planned = stage(shop.plan(text, target), "stage.ppo")
    assert planned["engines"]["actor"]["offload"] == "off" and planned["batch"]["generate_per_rank"] <= 8


LARGE = PIPELINE.replace("model.tiny", "model.o").replace(TINY, 'model o { from = "facebook/opt-1.3b" }\n')


def test_frozen_engines_rest_on_the_host_before_anything_that_trains_leaves(shop):
    """PPO of four OPT-1.3B on one GPU: of 53 GB of states 5 are of reference and reward model."""
    roomy, tight = (stage(shop.plan(LARGE, gpus(1, gib)), "stage.ppo") for gib in (80, 54))
    assert {name: e["offload"] for name, e in roomy["engines"].items()} == dict.fromkeys(roomy["engines"], "off")
    offloads = {name: e["offload"] for name, e in tight["engines"].items()}
    assert offloads == {"actor": "off", "critic": "off", "ref": "idle", "reward": "idle"}
    assert tight["memory"]["fits"] and zero_of({"stages": [tight]})["ref"] == 0
    weights = tight["memory"]["engines"]["ref"]["weights"]
    assert tight["memory"]["engines"]["ref"]["lasting"] == 0 and tight["memory"]["host"] >= 2 * weights
    score = {name: one["memory"]["phases"]["score"] for name, one in (("off", roomy), ("idle", tight))}
    assert score["off"]["resident"] - score["idle"]["resident"] >= 2 * weights


def test_idle_is_of_frozen_engines(shop):
    """In a block that engines share, it says nothing of those that train."""
    text = LARGE + "parallel p { offload = idle }\n"
    text = text.replace("model = stage.reward }", "model = stage.reward, parallel = parallel.p }")
    text = text.replace("lr = 1e-4 }\n  critic", "lr = 1e-4, parallel = parallel.p }\n  critic")
    planned = stage(shop.plan(text, gpus(1)), "stage.ppo")
    offloads = {name: engine["offload"] for name, engine in planned["engines"].items()}
    assert offloads == {"actor": "off", "critic": "off", "ref": "off", "reward": "idle"}


def test_shards_where_a_copy_has_no_room(shop):
    """OPT-66B as actor on 8 A100-80G: 122 GiB of weights have no room on one, an eighth of them has."""
    text = (ROOT / "recipes" / "opt-66b-8gpu.rlhf").read_text(encoding="utf-8")
    target = hardware.resolve({"gpu": "a100-80g", "gpus": 8}, None, CPU)
    planned = stage(shop.plan(text, target), "stage.ppo")
    chosen = planned["engines"]["actor"]["rollout"]
    assert (chosen["engine"], chosen["tensor"]) == ("graph", 8) and "in 8 shards" in chosen["reason"]
    whole = stage(shop.plan(text.replace("rollout {", "rollout {\n    tensor = 1"), target), "stage.ppo")
    chosen = whole["engines"]["actor"]["rollout"]
    assert (chosen["engine"], chosen["tensor"]) == ("eager", 1) and "have no room" in chosen["reason"]
    assert planned["time"]["each"]["generate"] < whole["time"]["each"]["generate"] / 10
    four = stage(shop.plan(text.replace("rollout {", "rollout {\n    tensor = 4"), target), "stage.ppo")
    chosen = four["engines"]["actor"]["rollout"]
    assert chosen["tensor"] == 4 and "in 4 shards" in chosen["reason"] and "GPUs that hold" not in chosen["reason"]


def test_weights_in_place_are_not_cut_unasked(shop):
    text = PIPELINE.replace("model.tiny", "model.o").replace(TINY, 'model o { from = "facebook/opt-1.3b" }\n')
    planned = stage(shop.plan(text, gpus(8)), "stage.ppo")
    assert planned["engines"]["actor"]["zero"] == 1 and planned["engines"]["actor"]["rollout"]["tensor"] == 1
    asked = stage(shop.plan(text.replace("rollout {", "rollout { tensor = 2,"), gpus(8)), "stage.ppo")
    chosen = asked["engines"]["actor"]["rollout"]
    assert (chosen["engine"], chosen["tensor"]) == ("graph", 2) and "in 2 shards" in chosen["reason"]
    more = asked["memory"]["phases"]["generate"]["working"] - planned["memory"]["phases"]["generate"]["working"]
    assert more > 1.2e9  # beside the weights in place, half of 2.6 GB: a copy of its own


def test_checkpointing_and_micro_follow_the_memory(shop):
    text = BIG.replace("PARALLEL", "zero = 3").replace("opt-13b", "opt-1.3b")
    roomy = stage(shop.plan(text, gpus(8, 80)), "stage.sft")["engines"]["policy"]
    tight = stage(shop.plan(text, gpus(8, 6)), "stage.sft")["engines"]["policy"]
    assert (roomy["gradient_checkpointing"], roomy["micro"]) == (
        False,
        8,
    )  # all 8 sequences of a rank at once
    assert tight["gradient_checkpointing"] is True and tight["micro"] < 8
    assert shop.plan(text, gpus(8, 6))["stages"][0]["memory"]["fits"]


def test_tokens_limit_the_micro_batch(shop):
    text = sft("steps = 1, batch = 256, length = 256, lr = 1e-3")
    assert stage(shop.plan(text), "stage.sft")["batch"]["micro"] == 16  # 4 Ki tokens where memory is unknown
    assert stage(shop.plan(text, gpus(1)), "stage.sft")["batch"]["micro"] == 64  # 16 Ki tokens
    reward = text.replace("stage sft {", "stage reward {")
    assert stage(shop.plan(reward), "stage.reward")["batch"]["micro"] == 8  # a pair is two sequences


def test_the_average_is_counted(shop):
    with_ema = PIPELINE.replace("actor { model", "actor { ema = 0.99, model")
    planned, without = (stage(shop.plan(t, gpus(4)), "stage.ppo") for t in (with_ema, PIPELINE))
    actor, bare = planned["memory"]["engines"]["actor"], without["memory"]["engines"]["actor"]
    assert actor["average"] == actor["parameters"]  # 4 bytes each, a quarter of them on each GPU
    assert actor["total"] - bare["total"] == actor["average"]
    assert planned["artifacts"] == {
        "policy": "runs/t/ppo/actor", "ema": "runs/t/ppo/actor-ema", "critic": "runs/t/ppo/critic",
    }  # fmt: skip
    assert planned["engines"]["actor"]["ema"] == 0.99


# ---- models and edges


def test_a_model_from_scratch_is_complete(shop):
    arch = shop.plan(PIPELINE)["models"]["model.tiny"]["arch"]
    # 8/3 x 32 = 85.3, up to a multiple of 32; 256 bytes + 3 specials
    assert arch == {
        "type": "llama", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4, "intermediate": 96,
        "vocab": 259, "context": 1024, "tied": True,
    }  # fmt: skip
    wide = PIPELINE.replace("arch = llama", "arch = gpt2, tied = off").replace("answer = 64", "answer = 1536")
    arch = shop.plan(wide)["models"]["model.tiny"]["arch"]
    assert (arch["intermediate"], arch["context"], arch["tied"]) == (128, 1600, False)


def test_weights_come_from_models_and_stages(shop):
    ppo = stage(shop.plan(PIPELINE), "stage.ppo")
    assert {name: engine["weights"] for name, engine in ppo["engines"].items()} == {
        "actor": {"stage": "stage.sft", "artifact": "policy"},
        "critic": {"stage": "stage.reward", "artifact": "reward"},
        "ref": {"stage": "stage.sft", "artifact": "policy"},
        "reward": {"stage": "stage.reward", "artifact": "reward"},
    }
    assert {engine["base"] for engine in ppo["engines"].values()} == {"model.tiny"}
    assert ppo["needs"] == ["stage.sft", "stage.reward"]


def test_a_key_holds_what_decides_the_facts(shop):
    def keys(text, target=CPU):
        return [edge["key"] for _, edge in lock.edges(shop.plan(text, target))]

    same = PIPELINE.replace("pairs", "others").replace("./others.jsonl", "./pairs.jsonl")
    same = same.replace("lr = 1e-3", "lr = 2e-3").replace("tiny", "small")
    assert keys(same) == keys(PIPELINE) == keys(PIPELINE, gpus(8))
    longer = keys(PIPELINE.replace("batch = 16, length = 128", "batch = 16, length = 96"))
    assert [a == b for a, b in zip(longer, keys(PIPELINE), strict=True)] == [False, False, True, True, True]


def test_what_stages_read(shop):
    ppo = PIPELINE.replace("kl {", "ptx { data = data.wiki, weight = 1, batch = 16 }\n  kl {")
    ppo += 'data wiki { from = "./wiki.jsonl", format = text }\n'
    edges = dict(lock.edges(shop.plan(ppo)))
    assert [(e["read"], e["part"], e["length"], e["overlong"], e["loss"]) for e in edges.values()] == [
        ("chat", "sft", 128, "cut", "answer"),
        ("chat", "eval", 128, "cut", "answer"),
        ("preference", "reward", 128, "cut", None),
        ("preference", "eval", 128, "cut", None),
        ("prompt", "ppo", 64, "drop", None),
        ("text", None, 128, "cut", "all"),
    ]


def test_origins_tell_where_values_come_from(shop):
    origins = shop.plan(PIPELINE)["origins"]
    assert origins["stage.sft.batch"] == {"layer": "file", "where": "t.rlhf:9:74", "text": "16"}
    assert origins["stage.ppo.update.clip"]["layer"] == "default"
    assert not any(address.startswith("cluster") for address in origins)


def test_unknown_models_stay_unknown(shop):
    text = BIG.replace("PARALLEL", "zero = auto").replace("facebook/opt-13b", "nobody/knows")
    plan = shop.plan(text, gpus(8))
    assert stage(plan, "stage.sft")["memory"]["peak"] is None
    assert stage(plan, "stage.sft")["time"] is None
    assert zero_of(plan, "stage.sft") == {"policy": 1}
    validate_plan(plan)
    assert "(known after lock)" in plan_text(plan)


def test_unreached_blocks_are_not_in_the_plan(shop):
    text = PIPELINE + 'data spare { from = "./spare.jsonl", format = text }\nmodel other { from = "gpt2" }\n'
    plan = shop.plan(text)
    assert list(plan["data"]) == ["data.pairs"] and list(plan["models"]) == ["model.tiny"]


# ---- goldens and purity


def check_golden(request, path, text):
    if request.config.getoption("--update-goldens"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; --update-goldens writes it"


PROMPT = {"text": "\n\nHuman: What is a lobster?\n\nAssistant:", "loss": False}
ANSWERS = [{"text": " A large crustacean.</s>", "loss": True}, {"text": " Food.</s>", "loss": True}]
SAMPLES = {
    "chat": [PROMPT, ANSWERS[0]],
    "preference": [PROMPT, *ANSWERS],
    "prompt": [PROMPT],
    "text": [{"text": " = Homarus gammarus = \n", "loss": True}],
}


def golden_plan():
    """The plan of golden/pipeline.rlhf for its cluster, with made-up facts of every edge and model."""
    recipe = load(GOLDEN / "pipeline.rlhf").recipe
    cluster = recipe.of_kind("cluster")[0]
    flags = {"address": cluster.address} | {key: cluster[key] for key in ("gpu", "gpus", "nodes")}
    target, locked = hardware.resolve({}, flags, CPU), lock.empty()
    plan, _ = compile(recipe, locked, target)
    for number, (_, edge) in enumerate(lock.edges(plan)):
        facts = edge_facts(30_000 + 100 * number, 30_017 + 100 * number, empty=5, too_long=12)
        locked["edges"][edge["key"]] = facts | {"sample": SAMPLES[edge["read"]]}
    for entry in plan["models"].values():
        listed = catalog.lookup(entry["from"]["hub"])
        facts = model_facts(entry)
        locked["models"][entry["key"]] = {name: listed.get(name, value) for name, value in facts.items()}
    validate_lock(locked)
    return compile(recipe, locked, target)[0]


def test_golden(request):
    plan = golden_plan()
    validate_plan(plan)
    check_golden(request, GOLDEN / "pipeline.json", to_json(plan))
    check_golden(request, GOLDEN / "pipeline.txt", plan_text(json.loads(to_json(plan))))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_shipped_recipes(request, path):
    """Every recipe of recipes/ plans without its lock; where a golden text stands, it is the same."""
    compilation = load(path)
    assert compilation.recipe is not None, render(compilation.diagnostics, compilation.sources, False)
    cluster = next(iter(compilation.recipe.of_kind("cluster")), None)
    flags = cluster and {"address": cluster.address} | {key: cluster[key] for key in ("gpu", "gpus", "nodes")}
    plan, found = compile(compilation.recipe, lock.empty(), hardware.resolve({}, flags, CPU))
    assert plan is not None, render(found, compilation.sources, False)
    validate_plan(plan)
    golden = GOLDEN / "recipes" / f"{path.stem}.txt"
    if golden.exists() or request.config.getoption("--update-goldens"):
        check_golden(request, golden, plan_text(plan))


def test_the_published_table_says_what_the_plans_say():
    """The hours in the README's table are what the plans print."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (opt-\S+) \| (\d+) (\S+) \| (\S+ \S+), (\S+ \S+) \| (\S+ \S+) \|", text, re.MULTILINE)
    assert len(rows) == 8
    for name, _, gpu, *hours in rows:
        golden = (GOLDEN / "recipes" / f"{name}.txt").read_text(encoding="utf-8")
        assert f" {gpu} (" in golden or f" {gpu}," in golden, name
        assert re.findall(r"^  \+  stage\.\w+ .* ~ (.+)$", golden, re.MULTILINE) == hours, name


def test_equal_inputs_give_equal_bytes(tmp_path):
    """In other processes, with other hash seeds and another working directory."""
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]; import test_plan_compile as t;"
        "sys.stdout.write(t.to_json(t.golden_plan()))"
    )
    texts = set()
    for seed, cwd in (("0", ROOT), ("1", tmp_path), ("4242", tmp_path)):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": f"UTC{seed[0]}"}
        command = [sys.executable, "-c", code, str(ROOT), str(Path(__file__).parent)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
        texts.add(done.stdout)
    assert texts == {to_json(golden_plan())}


FIRST, LAST = ("stages", 0), ("stages", 2)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*FIRST, "batch", "batch"), 12, "policy`: 1 x micro 16 x accumulation 1 is not the batch of 12"),
        ((*LAST, "engines", "critic", "micro"), 4, "critic`: 1 x micro 4 x accumulation 1 is not the batch of 16"),
        ((*FIRST, "engines", "policy", "weights", "model"), "model.x", "policy.weights`: there is no `model.x` in"),
        ((*LAST, "engines", "actor", "weights", "stage"), "stage.x", "there is no `policy` in a stage.x before it"),
        ((*FIRST, "edges", "train", "source"), "data.x", "train`: there is no `data.x` in `data` or `blends`"),
        (("blends", "blend.chat", "mix", "", "data.x"), 1.0, "`blends.blend.chat.mix`: there is no `data.x`"),
    ],
)
def test_a_plan_that_was_edited_by_hand(shop, path, value, said):
    plan = inner = shop.plan(PIPELINE)
    validate_plan(plan)
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(UserError, match=re.escape(said)):
        validate_plan(plan)
