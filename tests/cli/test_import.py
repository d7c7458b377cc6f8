"""`rlhf import`: what becomes of commands as their tools' documentation has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhfdsl.cli.main import main
from rlhfdsl.language import Recipe, load
from rlhfdsl.language.foreign import Unreadable, convert, read_command
from rlhfdsl.language.foreign.reading import STAGES
from rlhfdsl.language.foreign.tools import TOOLS, aliases
from rlhfdsl.language.settings import attributes_of

DEEPSPEED_CHAT = """\
#!/bin/bash
OUTPUT=$1
ZERO=$2
if [ "$OUTPUT" == "" ]; then
    OUTPUT=./output
fi
if [ "$ZERO" == "" ]; then
    ZERO=3
fi
Lr=9.65e-6
deepspeed --num_gpus 8 --master_port 12346 main.py \\
   --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \\
   --data_split 2,4,4 \\
   --actor_model_name_or_path facebook/opt-1.3b \\
   --critic_model_name_or_path facebook/opt-350m \\
   --num_padding_at_beginning 1 \\
   --per_device_generation_batch_size 16 --per_device_training_batch_size 8 \\
   --generation_batches 2 --ppo_epochs 1 \\
   --max_answer_seq_len 128 --max_prompt_seq_len 256 \\
   --actor_learning_rate ${Lr} --critic_learning_rate 5e-6 \\
   --lr_scheduler_type cosine --num_warmup_steps 100 --gradient_accumulation_steps 2 \\
   --deepspeed --seed 1234 --enable_ema --actor_lora_dim 128 \\
   --unsupervised_dataset_name wikitext --unsupervised_dataset_config_name wikitext-103-raw-v1 --unsup_coef 20 \\
   --actor_zero_stage $ZERO --critic_zero_stage 2 --output_dir $OUTPUT &> $OUTPUT/training.log
"""
OPENRLHF = """\
python3 -m openrlhf.cli.train_ppo_ray --actor.num_gpus_per_node 8 --actor.model_name_or_path OpenRLHF/Llama-3-8b-sft \\
  --reward.model_name_or_path OpenRLHF/Llama-3-8b-rm-700k --train.batch_size 128 --rollout.batch_size 1024 \\
  --rollout.n_samples_per_prompt 2 --ds.zero_stage 3 --actor.adam.lr 5e-7 --critic.adam.lr 9e-6 \\
  --algo.kl.init_coef 0.01 --data.prompt_dataset OpenRLHF/prompt-collection-v0.1 --vllm.num_engines 4
"""
TRL = """\
accelerate launch --num_processes 8 examples/scripts/ppo/ppo_tldr.py --dataset_name trl-lib/tldr \\
  --learning_rate 3e-6 --per_device_train_batch_size 16 --gradient_accumulation_steps 4 --total_episodes 1000000 \\
  --sft_model_path org/sft --reward_model_path org/rm --missing_eos_penalty 1.0 --kl_coef 0.03
"""
OPENRLHF_DPO = """\
deepspeed --module openrlhf.cli.train_dpo --pretrain a/b --dataset c/pairs --chosen_key better \\
  --rejected_key rejected --train_batch_size 256 --micro_train_batch_size 1 \\
  --learning_rate 5e-7 --beta 0.2 --zero_stage 3 --save_hf_ckpt
"""
TRL_DPO = """\
model_name_or_path: mistralai/Mistral-7B-v0.1
torch_dtype: null
dataset_name: trl-lib/ultrafeedback_binarized
bf16: true
beta: 0.01
gradient_accumulation_steps: 2
gradient_checkpointing_kwargs:
  use_reentrant: False
max_length: 1024
max_prompt_length: 512
per_device_train_batch_size: 8
"""
LLAMA_FACTORY = """\
model_name_or_path: Qwen/Qwen3-4B
stage: rm
do_train: true
finetuning_type: lora
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: dpo_en_demo
cutoff_len: 2048
max_samples: 1000
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
AXOLOTL = """\
base_model: tiiuae/Falcon-H1-1.5B-Deep-Base
load_in_8bit: false
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
sequence_len: 2048
context_parapllel_size: 2
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
lr_scheduler: cosine
learning_rate: 1e-5
"""


def imported(tmp_path: Path, text: str, *warnings: str) -> tuple[Recipe, dict[str, str]]:
    result = convert(read_command(text))
    path = tmp_path / "x.rlhf"
    path.write_text(result.text, encoding="utf-8")
    compilation = load(path)
    assert tuple(d.code for d in compilation.diagnostics) == warnings and compilation.recipe is not None
    return compilation.recipe, {name: why for _, name, why in result.notes}


def value(recipe: Recipe, address: str):
    block, _, name = address.rpartition(".")
    found = recipe.find(block)
    assert found is not None, address
    return found[name]


@pytest.mark.parametrize(
    ("text", "values", "notes"),
    [
        (
            DEEPSPEED_CHAT,
            {
                "stage.ppo.actor.lr": 5e-4, "stage.ppo.actor.lora.rank": 128, "stage.ppo.actor.lora.alpha": 1.0,
                "stage.ppo.actor.lora.targets": "all", "stage.ppo.actor.ema": 0.992, "stage.ppo.critic.warmup": 100,
                "stage.ppo.rollout.batch": 256, "stage.ppo.update.minibatch": 128, "stage.ppo.rollout.answer": 128,
                "parallel.shard.zero": 3, "parallel.critic.zero": 2, "recipe.seed": 1234, "recipe.output": "./output",
                "blend.chat.split.ppo": 0.4, "blend.chat.mix.rm_static": 0.5,
                "data.pretrain.subset": "wikitext-103-raw-v1",
                "stage.ppo.ptx.weight": 20.0, "cluster.node.gpus": 8, "data.full_hh_rlhf.format": "preference",
            },
            {
                "actor.lora.rank": "all else beside them", "actor.lr": "9.65e-6 was for the weights",
                "num_padding_at_beginning": "lengths", "kl.coef": "takes 0.1",
            },
        ),
        (
            OPENRLHF,
            {
                "stage.ppo.actor.lr": 5e-7, "stage.ppo.critic.lr": 9e-6, "stage.ppo.rollout.batch": 1024,
                "stage.ppo.rollout.answers": 2, "stage.ppo.update.minibatch": 128, "stage.ppo.kl.coef": 0.01,
                "parallel.shard.zero": 3,
            },
            {"vllm.num_engines": "no second engine", "format": "prompt"},
        ),
        (
            TRL,
            {
                "stage.ppo.actor.lr": 3e-6, "stage.ppo.rollout.batch": 512, "stage.ppo.update.minibatch": 512,
                "stage.ppo.reward.missing_eos": -1.0, "stage.ppo.kl.coef": 0.03, "stage.ppo.rollout.answer": 53,
            },
            {"total_episodes": "rollouts", "rollout.answer": "TRL takes 53"},
        ),
        (
            LLAMA_FACTORY,
            {
                "stage.reward.lr": 1e-4, "stage.reward.epochs": 3, "stage.reward.warmup": 0.1,
                "model.base.dtype": "bf16", "stage.reward.lora.rank": 8, "stage.reward.lora.alpha": 16.0,
                "stage.reward.batch": 8, "parallel.shard.zero": 3, "data.dpo_en_demo.rows": 1000,
            },
            {"dpo_en_demo": "dataset_info.json"},
        ),
        (
            AXOLOTL,
            {"stage.sft.lr": 1e-5, "stage.sft.batch": 8, "stage.sft.length": 2048, "parallel.shard.micro": 2},
            {"context_parapllel_size": "did it mean `context_parallel_size`"},
        ),
        (
            OPENRLHF_DPO,
            {
                "stage.dpo.lr": 5e-7, "stage.dpo.beta": 0.2, "stage.dpo.batch": 256, "stage.dpo.length": 512,
                "parallel.shard.zero": 3, "data.pairs.format": "preference", "data.pairs.columns.chosen": "better",
            },
            {"length": "takes 512"},
        ),
        (
            OPENRLHF_DPO.replace("train_dpo", "train_rm").replace("--beta 0.2", ""),
            {"stage.reward.lr": 5e-7, "stage.reward.batch": 256},
            {},
        ),
        (
            TRL_DPO,
            {
                "stage.dpo.beta": 0.01, "stage.dpo.batch": 16, "stage.dpo.length": 1024, "stage.dpo.lr": 1e-6,
                "model.base.dtype": "bf16",
            },
            {"max_prompt_length": "cut at `length`", "lr": "takes 1e-6"},
        ),
        (
            "accelerate launch --config_file=a.yaml trl/scripts/dpo.py --dataset_name a/b --model_name_or_path c/d",
            {"stage.dpo.batch": 8},
            {},
        ),
        (
            DEEPSPEED_CHAT.replace("--deepspeed", "--actor_weight_decay 0. --deepspeed").replace("9.65e-6", ".5"),
            {"stage.ppo.actor.weight_decay": 0.0},
            {"actor.lr": "0.5 was for the weights"},
        ),
        (
            '{"model_name_or_path": "a/b", "dataset_name": "c/d", "learning_rate": 1e-5, "torch_dtype": "bfloat16"}',
            {"stage.sft.lr": 1e-5, "model.base.dtype": "bf16"},
            {},
        ),
        (
            "ray job submit --address=http://a -- python3 -m openrlhf.cli.train_ppo_ray --pretrain a/b "
            "--reward_pretrain c/d --prompt_data e/f --input_key messages --train_batch_size 128",
            {"data.f.columns.prompt": "messages", "stage.ppo.update.minibatch": 128},
            {},
        ),
        (
            AXOLOTL + "adapter: qlora\nlora_r: 32\nlora_dropout: 0.05\nlora_target_modules:\n  - q_proj\n  - v_proj\n",
            {
                "stage.sft.lora.rank": 32, "stage.sft.lora.alpha": 8.0, "stage.sft.lora.dropout": 0.05,
                "stage.sft.lora.targets": ("q_proj", "v_proj"), "stage.sft.lr": 1e-5, "stage.sft.lora.base": "nf4",
            },
            {},
        ),
        (
            AXOLOTL + "load_in_4bit: true\nadapter: lora\nlora_r: 32\n", {"stage.sft.lora.base": "nf4"}, {},
        ),
        (AXOLOTL + "load_in_4bit: true\n", {}, {"lora.base": "their own type"}),
        (LLAMA_FACTORY + "quantization_bit: 4\n", {"stage.reward.lora.base": "nf4"}, {}),
        (
            LLAMA_FACTORY + "quantization_bit: 8\n", {"stage.reward.lora.base": "full"},
            {"quantization_bit": "4 bits or in their own type"},
        ),
        (
            TRL.rstrip() + "  --use_peft --load_in_4bit", {"stage.ppo.actor.lora.base": "nf4"}, {},
        ),
        (
            OPENRLHF.rstrip() + "  --ds.lora.rank 16 --ds.load_in_4bit",
            {"stage.ppo.actor.lora.base": "nf4", "stage.ppo.critic.lora.base": "nf4"}, {},
        ),
        (
            TRL.rstrip() + "  --use_peft --lora_r 8",
            {
                "stage.ppo.actor.lora.rank": 8, "stage.ppo.actor.lora.alpha": 32.0,
                "stage.ppo.actor.lora.dropout": 0.0,
            },
            {"actor.lora.dropout": "no dropout"},
        ),
        (
            OPENRLHF.rstrip() + "  --top_p 1.0", {"stage.ppo.rollout.top_p": None}, {},
        ),
        (
            OPENRLHF.rstrip() + "  --ds.lora.rank 16 --ds.lora.alpha 32 --ds.lora.target_modules q_proj v_proj",
            {
                "stage.ppo.actor.lora.rank": 16, "stage.ppo.critic.lora.targets": ("q_proj", "v_proj"),
                "stage.ppo.critic.lora.alpha": 32.0, "stage.ppo.critic.lr": 9e-6,
            },
            {},
        ),
    ],
    ids=["DeepSpeed-Chat", "OpenRLHF", "TRL", "LLaMA-Factory", "axolotl", "OpenRLHF-dpo", "OpenRLHF-rm", "TRL-dpo",
         "TRL-launched", "dots", "json", "OpenRLHF-ray",
         "axolotl-qlora", "axolotl-4bit", "axolotl-4bit-whole", "LLaMA-Factory-4bit",
         "LLaMA-Factory-8bit", "TRL-4bit", "OpenRLHF-4bit", "TRL-lora", "OpenRLHF-no-cut",
         "OpenRLHF-lora"],
)  # fmt: skip
def test_what_a_command_becomes(tmp_path, text, values, notes):
    recipe, found = imported(tmp_path, text)
    assert {address: value(recipe, address) for address in values} == values
    assert all(part in found[name] for name, part in notes.items())


def test_a_cut_distribution_is_taken_over_with_its_warning(tmp_path):
    recipe, notes = imported(tmp_path, OPENRLHF.rstrip() + "  --rollout.top_p 0.9", "W0303")
    assert value(recipe, "stage.ppo.rollout.top_p") == 0.9 and "rollout.top_p" not in notes


def test_every_setting_is_written_or_noted(tmp_path):
    """A setting that is neither in the recipe nor in a note is one that was dropped in silence."""
    for text in (DEEPSPEED_CHAT, OPENRLHF, OPENRLHF_DPO, TRL, TRL_DPO, LLAMA_FACTORY, AXOLOTL):
        command = read_command(text)
        tool = TOOLS[command.tool]
        noted = {name for _, name, _ in convert(command).notes}
        for given in command.settings:
            silent = tool.without.get(given.name, "x") == "" or given.values[:1] == ("false",)
            taken = given.name in tool.names or given.name in aliases(command.tool, command.stage)
            assert given.name in noted or taken or silent, given.name


def test_targets_are_settings_of_the_table():
    paths = {path for kind in STAGES for path in attributes_of(f"stage.{kind}")}
    for tool in TOOLS.values():
        assert {target for target in tool.names.values() if target and not target.startswith("@")} <= paths


def test_what_cannot_be_imported():
    with pytest.raises(Unreadable, match="OpenRLHF with kto; what is imported is `sft`, `reward`, `dpo`, `ppo`$"):
        read_command("python -m openrlhf.cli.train_kto --pretrain a/b --dataset c/d")
    with pytest.raises(Unreadable, match=r"with grpo.*`rlhf explain stage.grpo`"):
        read_command(OPENRLHF.rstrip() + " --algo.advantage.estimator group_norm")
    with pytest.raises(Unreadable, match="TRL with grpo"):
        read_command("model_name_or_path: a/b\ndataset_name: c/d\nbeta: 0.1\nnum_generations: 8\n")
    with pytest.raises(Unreadable, match="LLaMA-Factory with orpo"):
        read_command(LLAMA_FACTORY.replace("stage: rm", "stage: dpo\npref_loss: orpo"))
    with pytest.raises(Unreadable, match="name the tool"):
        read_command("ls --all --color")
    with pytest.raises(Unreadable, match="no command"):
        read_command("echo hello")
    with pytest.raises(Unreadable, match=r"its settings are in a/b\.yaml: import that file"):
        read_command("llamafactory-cli train a/b.yaml")
    with pytest.raises(Unreadable, match="not a command"):
        read_command("python -m openrlhf.cli.train_sft --pretrain 'a")
    with pytest.raises(Unreadable, match="YAML"):
        read_command("base_model: [\n")


def test_wrong_values_are_noted_and_not_written(tmp_path):
    recipe, notes = imported(tmp_path, AXOLOTL.replace("1e-5", "fast").replace("cosine", "rex"))
    assert "`fast` is nothing that `lr` takes" in notes["learning_rate"] and "cosine" in notes["lr_scheduler"]
    assert value(recipe, "stage.sft.lr") == 2e-4 and "axolotl takes 2e-4" in notes["lr"]


def test_no_value_breaks_the_recipe(tmp_path):
    """What stands in the recipe is what the table takes: a wrong value is a note, whatever it is."""
    wrong = ("", "nan", "1e400", "a b", "ü", "0x10", "-1", "1.2.3", "[1,2]", "ü.jsonl")
    for tool in TOOLS.values():
        name = next(name for name, one in TOOLS.items() if one is tool)
        for text in wrong:
            command = "python main.py " + " ".join(f"--{setting} {text}" for setting in tool.names)
            result = convert(read_command(command, name))
            path = tmp_path / "x.rlhf"
            path.write_text(result.text, encoding="utf-8")
            assert [d for d in load(path).diagnostics if d.severity == "error" and d.code != "E0311"] == []


def test_the_command(tmp_path, capsys):
    source, out = tmp_path / "ax.yaml", tmp_path / "ax.rlhf"
    source.write_text(AXOLOTL, encoding="utf-8")
    assert main(["import", str(source), "-o", str(out)]) == 0
    stdout, err = capsys.readouterr()
    assert stdout == f"wrote {out}\n" and f"{source}:7: context_parapllel_size: no setting" in err
    assert main(["fmt", "--check", str(out)]) == 0 and main(["check", "--strict", str(out)]) == 0
    assert main(["import", str(source), "-o", str(out)]) == 2
    source.write_text("nothing", encoding="utf-8")
    assert main(["import", str(source)]) == 2
