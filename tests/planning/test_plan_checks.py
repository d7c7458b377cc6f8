"""Each code of planning with a recipe that shows it, its whole message, and the place it points at."""

from __future__ import annotations

from dataclasses import replace

import pytest
from workshop import CPU, HEAD, PAIRS, PIPELINE, TINY, edge_facts, gpus, model_facts

from rlhfdsl.language import load
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import checks, compile, lock, shards
from rlhfdsl.planning.catalog import shape
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.validate import validate_plan

NODE = Target("cuda", "a100-80g", 80 * 2**30, 1, 8, "cluster.node")
CLUSTER = 'cluster node { gpus = 8, gpu = "a100-80g" }\n'


def sft(settings):
    return HEAD + TINY + PAIRS + f"stage sft {{ model = model.tiny, data = data.pairs, {settings} }}\n"


def said(diagnostic):
    return diagnostic.code, diagnostic.message, diagnostic.help


def test_batch_over_gpus(shop):
    text = CLUSTER + sft("batch = 100, length = 64, lr = 1e-3")
    found = shop.problem(text, NODE)
    assert said(found) == ("E0701", "batch = 100 sequences do not split over 8 GPUs", "batch = 96 or 104")
    assert (shop.text_at(found), found.label) == ("100", "100 = 8 x 12 + 4")
    assert found.notes == ("8 = 1 x 8 (cluster.node)",)
    assert [label.text for label in found.secondary] == ["8 on each of 1"]


def test_batches_of_ppo_over_gpus(shop):
    text = PIPELINE.replace("rollout { batch = 32", "rollout { batch = 24")
    text = text.replace("minibatch = 16", "minibatch = 12").replace("batch = 8, length", "batch = 16, length")
    text = text.replace("kl {", "ptx { data = data.wiki, weight = 1, batch = 20 }\n  kl {")
    text += 'data wiki { from = "./wiki.jsonl", format = text }\n'
    plan, found = shop.compile(text, gpus(16))
    assert plan is None
    assert [said(d)[:2] for d in found] == [
        ("E0701", "rollout.batch = 24 prompts do not split over 16 GPUs"),
        ("E0701", "update.minibatch = 12 sequences do not split over 16 GPUs"),
        ("E0701", "ptx.batch = 20 sequences do not split over 16 GPUs"),
    ]


def test_micro(shop):
    text = sft("batch = 96, length = 64, lr = 1e-3, parallel = parallel.p") + "parallel p { micro = 5 }\n"
    found = shop.problem(text, gpus(8))
    assert said(found) == (
        "E0702", "micro = 5 does not divide the 12 of stage.sft on each GPU",
        "micro = 4, or leave it to be derived",
    )  # fmt: skip
    assert (shop.text_at(found), found.label) == ("5", "12 = 5 x 2 + 2")


def test_minibatches(shop):
    text = PIPELINE.replace("minibatch = 16", "minibatch = 12").replace(
        "batch = 32,", "batch = 16, answers = 2,"
    )
    found = shop.problem(text)
    assert said(found) == (
        "E0703", "32 sequences of a rollout do not split into minibatches of 12", "minibatch = 8"
    )  # fmt: skip
    assert (found.label, found.secondary[0].text) == ("32 = 12 x 2 + 8", "16 prompts x 2 answers")


def test_no_update(shop):
    text = sft("batch = 64, length = 64, lr = 1e-3")
    shop.know(text, 40)
    found = shop.problem(text)
    assert said(found) == (
        "E0704", "40 sequences do not fill one batch of 64, so the stage would make no update",
        "a batch of at most 40, or more data",
    )  # fmt: skip
    assert shop.text_at(found) == "64"


@pytest.mark.parametrize(
    ("rows", "world", "message", "help"),
    [
        (1, 1, "1 sequence does not fill", "a batch of at most 1, or more data"),
        (1, 2, "1 sequence does not fill", "more data: a batch takes at least 2, one for each of 2 GPUs"),
        (41, 4, "41 sequences do not fill", "a batch of at most 40, or more data"),
    ],
)
def test_a_batch_that_fits_the_rows_also_splits_over_the_gpus(shop, rows, world, message, help):
    text = sft("batch = 64, length = 64, lr = 1e-3")
    shop.know(text, rows)
    found = shop.problem(text, gpus(world))
    assert found.code == "E0704" and found.message.startswith(message) and found.help == help


def test_no_rollout(shop):
    text = PIPELINE + "\n"
    rows = dict.fromkeys((a for a, _ in lock.edges(shop.plan(text))), 100) | {"stage.ppo.train": 31}
    shop.know(text, rows)
    assert said(shop.problem(text))[:2] == (
        "E0704", "31 prompts do not fill one batch of 32, so the stage would make no update"
    )  # fmt: skip


def test_the_actor_never_learns(shop):
    text = PIPELINE.replace("critic { model", "critic { warmup_rollouts = 3, model")
    text = text.replace("  data = blend.chat\n", "  data = blend.chat\n  rollouts = 3\n")
    found = shop.problem(text)
    assert said(found) == (
        "E0704", "the critic alone learns for 3 rollouts of 3, so the actor would make no update",
        "warmup_rollouts = 2 or less",
    )  # fmt: skip


def test_warmup(shop):
    text = sft("steps = 20, batch = 8, length = 64, lr = 1e-3, warmup = 50")
    found = shop.problem(text)
    assert said(found) == (
        "E0705", "a warm-up of 50 updates never reaches lr in a run of 20",
        "warmup = 2, or a ratio such as 3%",
    )  # fmt: skip
    assert shop.text_at(found) == "50"


def test_warmup_that_rounds_to_none(shop):
    plan, found = shop.compile(sft("steps = 10, batch = 8, length = 64, lr = 1e-3, warmup = 3%"))
    assert plan is not None
    assert [said(d)[:2] for d in found] == [("W0703", "a warm-up of 3% of 10 updates rounds to none")]


def test_context(shop):
    text = HEAD + 'model m { from = "gpt2" }\n' + PAIRS
    text += "stage sft { model = model.m, data = data.pairs, batch = 8, length = 2048, lr = 1e-3 }\n"
    found = shop.problem(text)
    assert said(found) == (
        "E0706", "sequences of 2048 tokens exceed the 1024 positions of `model.m`",
        "at most 1024 tokens in all",
    )  # fmt: skip
    assert shop.text_at(found) == "2048"
    assert [label.text for label in found.secondary] == ["1024 positions"]


def test_context_of_a_rollout(shop):
    text = PIPELINE.replace("prompt = 64, answer = 64", "prompt = 700, answer = 400")
    text = text.replace("dtype = fp32", "dtype = fp32, context = 1024")
    found = shop.problem(text)
    assert found.message == "prompt 700 + answer 400 = 1100 tokens exceed the 1024 positions of `model.tiny`"


TWO_MODELS = PIPELINE.replace("model = stage.sft, data", "model = model.judge, data") + TINY.replace(
    "model tiny", "model judge"
).replace("layers = 2", "layers = 3")


@pytest.mark.parametrize(
    ("changed", "code", "word"),
    [
        ({"tokenizer": "sha256:cc"}, "E0707", "tokenizer"),
        ({"template": "sha256:dd"}, "E0708", "chat template"),
    ],
)
def test_digests_on_an_edge(shop, changed, code, word):
    shop.know(TWO_MODELS, 100)
    judge = shop.plan(TWO_MODELS)["models"]["model.judge"]
    shop.lock["models"][judge["key"]] = model_facts(judge, **changed)
    plan, found = shop.compile(TWO_MODELS)
    assert plan is None
    assert [said(d)[:2] for d in found] == [
        (code, f"the critic's {word} is not the actor's"),
        (code, f"the reward's {word} is not the actor's"),
    ]
    assert found[0].label.startswith("model.judge: ") and found[0].secondary[0].text.startswith(
        "model.tiny: "
    )
    assert shop.text_at(found[0]) == "stage.reward"


def test_pickled_weights_are_told_of_once(shop):
    text = sft("batch = 4, length = 64, lr = 1e-3")
    text = text.replace(TINY, "") + 'model tiny { from = "facebook/opt-125m", dtype = fp32 }\n'
    shop.know(text, 100)
    entry = shop.plan(text)["models"]["model.tiny"]
    pins = {"config.json": {}, "pytorch_model-00001-of-00002.bin": {}, "pytorch_model-00002-of-00002.bin": {}}
    hub = {"facebook/opt-125m": {"revision": "0" * 40, "files": pins}}
    shop.lock["models"][entry["key"]] |= {"hub": hub}
    plan, found = shop.compile(text)
    assert plan is not None and [d.code for d in found] == ["W0707"]
    assert found[0].message == "the weights of `facebook/opt-125m` are in .bin form, which is pickle"
    assert found[0].notes[0].startswith("pytorch_model-00001-of-00002.bin and 1 more: ")
    assert shop.text_at(found[0]) == '"facebook/opt-125m"'
    assert plan["stages"][0]["memory"]["engines"]["policy"]["parameters"] == 125_239_296  # by the catalog


def test_a_reference_has_all_ids_of_the_actor(shop):
    """A critic and a reward model need not: `TWO_MODELS` gives them 259 ids beside the actor's 300."""
    larger = TWO_MODELS.replace("heads = 4, dtype", "heads = 4, vocab = 300, dtype", 1)
    shop.know(larger, 100)
    assert shop.compile(larger)[1] == ()
    text = larger.replace("  kl { coef", "  ref { model = model.judge }\n  kl { coef")
    shop.know(text.replace("vocab = 300, ", ""), 100)
    (found,) = (d for d in shop.compile(text)[1] if d.severity == "error")
    assert said(found)[:2] == (
        "E0718",
        "the actor `model.tiny` can sample 300 ids, and the reference `model.judge` has 259",
    )
    assert shop.text_at(found) == "model.judge"


def test_bytes_beside_other_tokens(shop):
    text = PIPELINE.replace("model = stage.sft, data", "model = model.judge, data")
    text += 'model judge { from = "gpt2", dtype = fp32 }\n'
    plan, found = shop.compile(text)
    assert plan is None and {d.code for d in found} == {"E0707"}
    assert found[0].label == "model.judge: its own tokenizer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("vocab = 258", "vocab = 258 is smaller than the byte tokenizer's 259"),
        ("hidden = 36", "a head of llama is 9 wide, and rotary positions need an even width"),
        ("arch = opt, kv_heads = 2", "opt has as many key heads as heads, and kv_heads = 2 is not 4"),
        ('tokenizer = "gpt2"', "`model.tiny` has a tokenizer of its own and no `vocab`"),
    ],
)
def test_models_from_scratch(shop, changes, message):
    tiny = TINY
    for change in changes.split(", "):
        name, _, value = change.partition(" = ")
        written = {"hidden": "hidden = 32", "arch": "arch = llama"}.get(name)
        tiny = (
            tiny.replace(written, change) if written else tiny.replace("layers", f"{name} = {value}, layers")
        )
    text = sft("batch = 8, length = 64, lr = 1e-3").replace(TINY, tiny)
    assert said(shop.problem(text))[:2] == ("E0709", message)


def test_types_of_devices(shop):
    text = sft("batch = 8, length = 64, lr = 1e-3")
    found = shop.problem(text.replace("fp32", "fp16"))
    assert said(found) == ("E0710", "a CPU does not train in fp16", "dtype = bf16 or fp32")
    assert found.notes == ("the target is cpu (detected)",) and shop.text_at(found) == "fp16"
    volta = Target("cuda", "v100-32g", 32 * 2**30, 1, 1, "--gpu")
    assert said(shop.problem(text.replace("fp32", "bf16"), volta)) == (
        "E0710", "v100-32g does not compute in bf16", "dtype = fp16 or fp32"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parallel", "target", "message"),
    [
        ("zero = 0", gpus(1), "ZeRO 0 cannot sum the gradients of bf16 weights in fp32"),
        ("offload = both", CPU, "offload has no effect on a CPU"),
        ("zero = 3, offload = idle", gpus(1), "offload = idle moves whole weights, and zero is 3"),
        ("zero = 2, offload = params", gpus(1), "offload = params needs ZeRO 3, and zero is 2"),
    ],
)
def test_zero_and_offload(shop, parallel, target, message):
    text = sft("batch = 8, length = 64, lr = 1e-3, parallel = parallel.p").replace("fp32", "bf16")
    found = shop.problem(text + f"parallel p {{ {parallel} }}\n", target)
    assert said(found)[:2] == ("E0711", message)


def test_offload_of_the_optimizer_needs_zero(shop):
    text = sft("batch = 8, length = 64, lr = 1e-3, parallel = parallel.p")
    found = shop.problem(text + "parallel p { zero = 0, offload = optimizer }\n", gpus(1))
    assert said(found) == ("E0711", "offload = optimizer needs ZeRO 1, 2 or 3, and zero is 0", "zero = 2")


DPO = "stage dpo { model = stage.sft, data = data.pairs, batch = 8, length = 64, lr = 1e-4, ref { model = model.o } }\n"
RL = PIPELINE.replace("model.tiny", "model.o").replace(TINY, 'model o { from = "facebook/opt-125m" }\n') + DPO


@pytest.mark.parametrize(
    ("stage", "engines", "offload", "labels"),
    [
        ("sft", ["batch = 16,"], "idle", ["the policy trains"]),
        ("ppo", ["actor {", "critic {"], "idle", ["the actor trains", "the critic trains"]),
        ("ppo", ["reward {"], "optimizer", ["the reward does not train"]),
        ("dpo", ["ref {"], "idle", ["the ref is in use all through its stage"]),
    ],
)  # fmt: skip
def test_offload_that_nothing_can_have(shop, stage, engines, offload, labels):
    before, at, text = RL.partition(f"stage {stage} ")
    for engine in engines:
        text = text.replace(engine, f"{engine} parallel = parallel.p, ", 1)
    found = shop.problem(f"{before}{at}{text}parallel p {{ offload = {offload} }}\n", gpus(1))
    assert said(found)[:2] == ("E0711", f"offload = {offload} has no effect: none of its engines can have it")
    assert (shop.text_at(found), [label.text for label in found.secondary]) == (offload, labels)


def test_offload_of_a_block_that_engines_share(shop):
    """Each finds in it what is for it, so that one that can have it is enough."""
    text = RL
    for engine in ("  actor {", "  reward {"):
        text = text.replace(engine, f"{engine} parallel = parallel.p,")
    for offload in ("idle", "optimizer", "both"):
        shop.plan(f"{text}parallel p {{ offload = {offload} }}\n", gpus(1))


def test_offload_of_engines_that_infer(shop):
    text = RL.replace("  reward {", "  reward { parallel = parallel.p,")
    found = shop.problem(text + "parallel p { offload = idle }\n", CPU)
    assert said(found)[:2] == ("E0711", "offload has no effect on a CPU")
    found = shop.problem(text + "parallel p { offload = params, zero = 0 }\n", gpus(1))
    assert said(found)[:2] == ("E0711", "offload = params needs ZeRO 3, and zero is 0")


def test_memory(shop):
    text = HEAD + 'model big { from = "facebook/opt-13b" }\n' + PAIRS + "parallel p { offload = off }\n"
    text += "stage sft { model = model.big, data = data.pairs, batch = 8, length = 512, lr = 1e-5\n"
    text += "  parallel = parallel.p }\n"
    found = shop.problem(text, gpus(1))
    # 12.85e9 x (2 + 4 + 12) and 50272 x 5120 x 2 bytes = 216.0 GiB; a bucket of 2e8 x 2 bytes = 0.4 GiB; one sequence
    # with checkpointing
    assert said(found)[:2] == (
        "E0712", "stage.sft needs 216.7 GiB of each a100-80g, of whose 80.0 GiB a plan may fill 72.0 GiB",
    )  # fmt: skip
    # at stage 2 the fp32 gradients would stay on the GPU beside the weights: 12.85e9 x (2 + 4) bytes = 71.8 GiB
    assert found.help.startswith("`zero = 3, offload = optimizer, gradient_checkpointing = on, micro = auto` fits; `")
    assert found.notes[0] == "policy: 216.0 GiB of model states at ZeRO 1"
    assert shop.text_at(found) == "stage sft"
    assert shop.plan(text, gpus(1, None))["stages"][0]["memory"]["fits"] is None  # unknown memory is no error
    tight = shop.problem(text.replace("opt-13b", "opt-66b"), gpus(1, 1))
    assert tight.help == "nothing here fits: more or larger GPUs, or a smaller model"


def test_memory_of_a_node(shop):
    """12.85e9 x 16 bytes of optimizer, half as much again for buffers (DeepSpeed's estimator), with offload of it."""
    text = HEAD + 'model big { from = "facebook/opt-13b" }\n' + PAIRS
    text += "stage sft { model = model.big, data = data.pairs, batch = 8, length = 512, lr = 1e-5 }\n"
    known = replace(gpus(1), host=256 * 2**30)
    found = shop.problem(text, known)
    assert said(found)[:2] == (
        "E0719", "what stage.sft offloads needs 287.3 GiB of the host of each node, of whose 256.0 GiB a plan may fill "
        "230.4 GiB",
    )  # fmt: skip
    assert found.notes == ("policy: 287.3 GiB with offload = optimizer",) and shop.text_at(found) == "stage sft"
    assert found.help.startswith('`zero = 3, offload = both, nvme = "FOLDER", gradient_checkpointing = on, ')
    for host in (None, 320 * 2**30):
        memory = shop.plan(text, replace(known, host=host))["stages"][0]["memory"]
        assert memory["fits"] and memory["host_usable"] == (None if host is None else int(0.9 * host))


def test_offload_that_a_gpu_has_no_need_of(shop):
    """1.3e9 x 18 bytes, half as much again for buffers, are 33 GiB on the host; a GPU of 80 GiB has room for them."""
    text = HEAD + 'model big { from = "facebook/opt-1.3b" }\n' + PAIRS + "parallel p { offload = both }\n"
    text += "stage sft { model = model.big, data = data.pairs, batch = 8, length = 512, lr = 1e-5\n"
    text += "  parallel = parallel.p }\n"
    found = shop.problem(text, replace(gpus(1, 80), host=20 * 2**30))
    assert found.code == "E0719" and "`offload = off, gradient_checkpointing = on, micro = auto` fits" in found.help


def test_the_way_out_changes_little(shop):
    """A micro batch written too large: deriving it costs no time, so it comes before higher ZeRO stages."""
    text = HEAD + 'model big { from = "facebook/opt-1.3b" }\n' + PAIRS
    text += "parallel p { gradient_checkpointing = off, offload = off, zero = 1, micro = 64 }\n"
    text += "stage sft { model = model.big, data = data.pairs, batch = 128, length = 512, lr = 1e-5\n"
    text += "  parallel = parallel.p }\n"
    found = shop.problem(text, gpus(2, 48))
    assert found.help.startswith("`micro = auto` fits; `zero = 2, micro = auto` fits (time ")


def test_more_gpus_instead_of_offload(shop):
    """OPT-66B: 18 bytes for each of 66e9 parameters are 17 GiB on each of 64 GPUs, and 34 on 32 of 40 GiB."""
    text = HEAD + 'model big { from = "facebook/opt-66b" }\n' + PAIRS + "parallel p { offload = off }\n"
    text += "stage sft { model = model.big, data = data.pairs, batch = 256, length = 512, lr = 1e-5\n"
    text += "  parallel = parallel.p }\n"
    found = shop.problem(text, gpus(8, 40))
    assert found.help.startswith("`zero = 3, offload = ")
    assert found.help.endswith("; --gpus 8 --nodes 8 fits with `zero = auto, offload = off, micro = auto`")


def test_parts_without_rows(shop):
    shop.know(PIPELINE, 100)
    key = shop.plan(PIPELINE)["stages"][1]["edges"]["eval"]["key"]
    shop.lock["edges"][key] = edge_facts(0, 12, tie=10, too_long=2)
    found = shop.problem(PIPELINE)
    assert said(found)[:2] == ("E0713", "`blend.chat.eval` has no rows for stage.reward")
    assert found.notes == ("12 rows in the part", "2 dropped: too long", "10 dropped: tie")


def test_unknown_gpu(shop):
    recipe = shop.recipe(CLUSTER.replace("a100-80g", "a100") + sft("batch = 8, length = 64, lr = 1e-3"))
    found = checks.unknown_gpu(recipe, "a100", "cluster.node.gpu")
    assert said(found)[:2] == ("E0714", "`a100` is not in the catalog of GPUs")
    assert found.help == "did you mean `a100-40g`, `a100-80g`?" and shop.text_at(found) == '"a100"'
    assert checks.unknown_gpu(recipe, "tpu", "cluster.node.gpu").help.startswith("one of v100-32g, a6000-48g")


def test_warnings(shop):
    text = sft("batch = 64, length = 64, lr = 1e-3, eval = data.held")
    text = text.replace("eval = data.held", "eval = data.held, every { eval = 9 }").replace(
        ", every", "\n every"
    )
    text += 'data held { from = "./held.jsonl", format = preference }\n'
    shop.know(text, 100)
    plan, found = shop.compile(text)
    assert plan is not None
    assert [said(d)[:2] for d in found] == [
        ("W0701", "36 of 100 sequences are in no batch"),
        ("W0702", "every.eval = 9 updates is longer than the run of 1"),
    ]
    assert found[0].notes == ("100 = 64 x 1 + 36",)


def test_all_mistakes_come_at_once(shop):
    text = PIPELINE.replace("batch = 16, length = 128", "batch = 15, length = 2000")
    text = text.replace("dtype = fp32", "dtype = fp16, context = 1024").replace(
        "minibatch = 16", "minibatch = 10"
    )
    plan, found = shop.compile(text, Target("cpu", None, None, 1, 2, "--gpus"))
    assert plan is None
    assert [d.code for d in found] == ["E0710", "E0706", "E0701", "E0703"]


def lora(settings):
    return sft(f"batch = 8, length = 64, lr = 1e-3\n  lora {{ {settings} }}\n")


def test_adapters_find_a_layer(shop):
    found = shop.problem(lora('rank = 4, targets = ["q_proj", "c_attn"]'))
    assert said(found)[:2] == ("E0730", "no linear layer of llama is named `c_attn`")
    assert found.help.startswith("its layers: self_attn.q_proj, ") and shop.text_at(found) == '["q_proj", "c_attn"]'
    unknown = lora("rank = 4, targets = mlp").replace(TINY, 'model far { from = "someone/else" }\n')
    unknown = unknown.replace("model.tiny", "model.far")
    found = shop.problem(unknown)
    assert said(found)[:2] == ("E0730", "planning does not know which layers of `model.far` are its mlp")
    (stage,) = shop.plan(unknown.replace(", targets = mlp", ""))["stages"]
    assert stage["engines"]["policy"]["lora"]["targets"] == "all-linear"


def test_adapters_are_smaller_than_their_layers(shop):
    found = shop.problem(lora("rank = 32"))
    assert said(found) == (
        "E0731", "an adapter of rank 32 is not smaller than `self_attn.q_proj`, which is 32 x 32",
        "rank = 8 or less, or train the weights themselves: leave `lora` out",
    )  # fmt: skip
    assert shop.text_at(found) == "32"


WIDE = sft("batch = 8, length = 64, lr = 1e-3, parallel = parallel.p\n  lora { rank = 4, base = nf4 }\n").replace(
    "hidden = 32", "hidden = 64"
)


@pytest.mark.parametrize(("setting", "why"), [
    ("zero = 3", "ZeRO 3 would"), ("offload = both", "ZeRO 3, which `offload` needs here, would"),
    ('nvme = "/drive", offload = optimizer', "ZeRO 3, which `nvme` needs here, would"),
])  # fmt: skip
def test_a_base_in_4_bits_is_not_cut(shop, setting, why):
    found = shop.problem(WIDE + f"parallel p {{ {setting} }}\n", gpus(2))
    assert said(found) == (
        "E0732", f"{why} cut the base in 4 bits of the policy: its scales are no parameters",
        "zero = 2 or less, and offload = optimizer or none, in a `parallel` block of its own",
    )  # fmt: skip
    assert shop.text_at(found) in ("3", "both", '"/drive"')
    assert [label.text for label in found.secondary] == ["the base in 4 bits"]


def test_a_base_in_4_bits_is_not_cut_to_sample(shop):
    text = PIPELINE.replace("hidden = 32", "hidden = 64").replace("model = stage.sft, lr = 1e-4", """
    model = stage.sft, lr = 1e-4
    lora { rank = 4, base = nf4 }
  """).replace("rollout { batch", "rollout { engine = graph, tensor = 2, batch")  # fmt: skip
    found = shop.problem(text, gpus(2))
    assert found.code == "E0732" and found.message.startswith("tensor = 2 would cut a base in 4 bits")
    assert shop.text_at(found) == "2" and found.help == "leave `tensor` out"


def test_a_base_in_4_bits_has_whole_blocks(shop):
    found = shop.problem(WIDE.replace("hidden = 64", "hidden = 32, intermediate = 64") + "parallel p { }\n")
    assert said(found) == (
        "E0733", "the 32 inputs of `self_attn.q_proj` do not split into blocks of 64", "hidden = 64, or base = full",
    )  # fmt: skip
    assert shop.text_at(found) == "nf4"
    found = shop.problem(WIDE.replace("hidden = 64", "hidden = 128") + "parallel p { }\n")  # 352 in the MLP by default
    assert found.help == "intermediate = 384, or base = full"
    odd = model_facts({"arch": {"type": "llama", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 4, "vocab": 300,
                                "intermediate": 96, "context": 128, "tied": True}})  # fmt: skip
    named = WIDE.replace(TINY.replace("hidden = 32", "hidden = 64"), 'model tiny { from = "some/one" }\n')
    key = shop.plan(named + "parallel p { }\n")["models"]["model.tiny"]["key"]
    shop.lock["models"][key] = odd
    assert shop.problem(named + "parallel p { }\n").help == "base = full"


def test_merged_adapters_are_rounded_again(shop):
    text = WIDE.replace("parallel = parallel.p", "") .replace("base = nf4", "base = full")
    text += """stage sft again {
  model = stage.sft, data = data.pairs, batch = 8, length = 64, lr = 1e-3
  lora { rank = 4, base = nf4 }
}
"""
    plan, found = shop.compile(text)
    (warning,) = [d for d in found if d.code != "W0201"]
    assert plan is not None and warning.code == "W0709" and shop.text_at(warning) == "nf4"
    assert "`stage.sft` learned is merged and rounded to 4 bits here" in warning.message
    _, found = shop.compile(text.replace("lora { rank = 4, base = full }", ""))
    assert "W0709" not in [d.code for d in found]


def test_every_code_has_a_test():
    """A code that no test of this file names was never seen."""
    from pathlib import Path

    text = Path(__file__).read_text(encoding="utf-8")
    assert [code for code in checks.CODES if f'"{code}"' not in text] == []


def test_a_plan_that_is_not_one(shop):
    plan = shop.plan(PIPELINE)
    validate_plan(plan)
    with pytest.raises(UserError, match="has format 2.0") as error:
        validate_plan(plan | {"format_version": "2.0"})
    assert error.value.code == "E0720"
    rest = {name: value for name, value in plan["stages"][0].items() if name != "settings"}
    with pytest.raises(UserError, match=r"at `stages\[0\]`: 'settings' is a required property") as error:
        validate_plan(plan | {"stages": [rest, *plan["stages"][1:]]})
    assert error.value.help == "plan the recipe again"
    plan["stages"][0]["batch"]["micro"] = 0
    with pytest.raises(UserError, match=r"stages\[0\]"):
        validate_plan(plan)


def test_recipes_without_facts_have_no_row_errors(shop):
    """What only the lock can tell is no error before it."""
    path = shop.folder / "t.rlhf"
    shop.recipe(PIPELINE)
    plan, found = compile(load(path).recipe, lock.empty(), CPU)
    assert plan is not None and found == ()


def test_attention_that_a_type_lacks(shop):
    text = HEAD + 'model g { from = "google/gemma-2-2b" }\n' + PAIRS
    text += "stage sft { model = model.g, data = data.pairs, batch = 8, length = 64, lr = 1e-5 }\n"
    assert said(shop.problem(text, gpus(1))) == (
        "E0715", "transformers has no sdpa attention for gemma2", "attention = eager"
    )  # fmt: skip
    assert shop.plan(text.replace('2b"', '2b", attention = eager'), gpus(1))


def test_transformers_refuses_what_we_refuse():
    """The table of families says which types have no sdpa; transformers says the same."""
    import torch
    from shapes import config_of, tiny
    from transformers import AutoModelForCausalLM

    from rlhfdsl.planning.families import FAMILIES

    for kind, family in FAMILIES.items():
        with torch.device("meta"):
            if family.sdpa:
                AutoModelForCausalLM.from_config(config_of(tiny(kind)), attn_implementation="sdpa")
            else:
                with pytest.raises(ValueError, match="scaled_dot_product_attention"):
                    AutoModelForCausalLM.from_config(config_of(tiny(kind)), attn_implementation="sdpa")


def test_what_holds_the_policy(shop):
    assert shop.compile(PIPELINE.replace("coef = 0.05", "coef = 0"))[1] == ()  # the language warned: W0301
    text = PIPELINE.replace("reward { model = stage.reward }", "reward { model = stage.reward }\n  ref { model = REF }")
    assert shop.compile(text.replace("REF", "stage.sft"))[1] == ()
    _, found = shop.compile(text.replace("REF", "model.tiny"))
    assert [said(d)[:2] for d in found] == [
        ("W0705", "the reference is `model.tiny`, and the actor starts from `stage.sft`")
    ]


def test_rows_that_are_cut_or_dropped(shop):
    shop.know(PIPELINE, 100)
    stages = {stage["address"]: stage["edges"]["train"]["key"] for stage in shop.plan(PIPELINE)["stages"]}
    shop.lock["edges"][stages["stage.sft"]] = edge_facts(100) | {"truncated": 26}
    shop.lock["edges"][stages["stage.reward"]] = edge_facts(100) | {"truncated": 50}  # of 200 sequences
    shop.lock["edges"][stages["stage.ppo"]] = edge_facts(100, 201, too_long=101)
    _, found = shop.compile(PIPELINE)
    assert [said(d)[:2] for d in found if d.code == "W0706"] == [
        ("W0706", "26 of 100 sequences are cut at 128 tokens"),
        ("W0706", "101 of 201 rows are dropped"),
    ]


@pytest.mark.parametrize(
    ("tensor", "arch", "label", "help"),
    [
        (3, "heads = 12, kv_heads = 12", "3 does not divide the 8 GPUs of a node", "tensor = 2, or leave"),
        (8, "heads = 12, kv_heads = 12", "8 does not divide the 12 heads of a layer", "tensor = 4, or leave"),
        (4, "heads = 12, kv_heads = 2", "4 does not divide the 2 heads of keys and values", "tensor = 2, or leave"),
        (4, "heads = 12, intermediate = 90", "4 does not divide the MLP's width of 90", "tensor = 2, or leave"),
    ],
)  # fmt: skip
def test_shards_that_do_not_come_out_even(shop, tensor, arch, label, help):
    tiny = f"model tiny {{ arch = llama, layers = 2, hidden = 96, {arch}, dtype = bf16 }}\n"
    text = PIPELINE.replace(TINY, tiny).replace("rollout {", f"rollout {{ tensor = {tensor},")
    found = shop.problem(text, gpus(8))
    code, message, hint = said(found)
    assert code == "E0717" and f"in {tensor} shards" in message and hint.startswith(help)
    assert (shop.text_at(found), found.label) == (str(tensor), label)
    assert shop.problem(text, gpus(1)).label == f"{tensor} does not divide the one GPU of a node"


def test_shards_need_the_graph(shop):
    text = PIPELINE.replace("rollout {", "rollout { tensor = 2,")
    code, message, help = said(shop.problem(text, Target("cpu", None, None, 1, 2, "--gpus")))
    assert code == "E0717" and "samples with `generate`" in message
    assert help == "leave `tensor` out, or write `engine = graph`"
    code, message, help = said(shop.problem(text.replace("tensor = 2", "tensor = 2, engine = eager"), gpus(2)))
    assert code == "E0717" and "samples with `generate`" in message and help == "leave `tensor` out"


def test_a_type_that_is_not_cut(shop):
    """OLMo 2's norms of queries and keys run over all heads."""
    entry = {"type": "olmo2", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 4, "intermediate": 128, "vocab": 100,
             "context": 512, "tied": False}  # fmt: skip
    assert shards.misfit(shape(entry), 2, 8) == "olmo2: its norms of queries and keys run over all heads at once"
    assert shards.misfit(shape(entry), 1, 8) is None


def test_a_rollout_engine_that_a_type_cannot_have(shop):
    """Of a type that is not in the table: left to itself the plan takes `generate` and says why."""
    text = PIPELINE.replace("model.tiny", "model.b") + 'model b { from = "acme/new" }\n'
    text = text.replace("rollout {", "rollout { engine = graph,")
    code, message, help = said(shop.problem(text, gpus(1)))
    assert code == "E0716" and "not been proved" in message and help.startswith("engine = eager")
    planned = shop.plan(text.replace("engine = graph,", ""), gpus(1))
    (stage,) = (s for s in planned["stages"] if s["kind"] == "ppo")
    assert stage["engines"]["actor"]["rollout"]["engine"] == "eager"
