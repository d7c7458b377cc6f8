"""The settings of other tools: what each becomes here, and those that are known to become nothing.

A target is a path inside the stage (`lr`, `rollout.prompt`), or begins with `@` for what stands elsewhere or is
calculated. Names that the table of the language lists as aliases (`x-aliases`) need not stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from rlhfdsl.language import schema


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool: texts that tell of it, names with their targets, and names without a counterpart and why."""

    marks: tuple[str, ...]
    names: Mapping[str, str]
    without: Mapping[str, str] = field(default_factory=dict)


_WHOLE = "weights are held in their own type"
_LORA = "lora { } trains the adapters alone, of one kind"
_DERIVED = "derived here"
_HOOKS = "metrics and samples go to the run's folder"
_FAST = "chosen here from what the model and the GPU allow"
_TENSOR = "`rollout.tensor` takes by itself the GPUs of a copy of the weights that hold the most answers"
_PACKED = "rows run without their padding in any case, and `batch` counts sequences"
_ENGINE = "the rollout runs on the training weights, so there is no second engine to set up"
_HUB = "nothing is pushed to a hub"
_LOAD = "sources are read once, when rlhf.lock is made"
_LAUNCH = "the launcher's own"
_INTERVAL = "an interval: every { eval = 100 }"
_DROPOUT = "dropout is 0 here unless it is written"
_PART = "evaluate on a part of a blend: split { sft = 98%, eval = 2% }"
_CODE = "code of a model's repository is never run"
_ONE = "a sequence stays on one GPU"
_TEMPLATE = "the model's template is always applied"
_SAVE = "`every { checkpoint = 10m }` and `keep` say it; a stage saves its result at its end"

_COMMON = {
    "gradient_accumulation_steps": "@accumulation",
    "per_device_train_batch_size": "@micro",
    "seed": "@recipe.seed",
    "output_dir": "@recipe.output",
    "deepspeed": "@deepspeed",
    "gradient_checkpointing": "@parallel.gradient_checkpointing",
    "bf16": "@bf16",
    "fp16": "@fp16",
}
_COMMON_WITHOUT = {
    "per_device_eval_batch_size": _DERIVED,
    "report_to": _HOOKS, "run_name": _HOOKS, "logging_dir": _HOOKS,
    "save_steps": _SAVE, "save_strategy": _SAVE, "save_total_limit": _SAVE, "save_only_model": _SAVE,
    "eval_strategy": _INTERVAL, "eval_steps": _INTERVAL, "do_train": "", "do_eval": _INTERVAL, "log_level": _HOOKS,
    "attn_implementation": _FAST, "gradient_checkpointing_kwargs": _FAST, "evaluation_strategy": _INTERVAL,
    "push_to_hub": _HUB, "hub_model_id": _HUB,
    "ddp_timeout": _LAUNCH,
    "overwrite_output_dir": "a run never overwrites another", "overwrite_cache": _LOAD,
    "preprocessing_num_workers": _LOAD, "dataloader_num_workers": _LOAD, "dataset_num_proc": _LOAD,
    "resume_from_checkpoint": "`rlhf run` goes on by itself", "tf32": _FAST, "optim": "the optimizer is AdamW",
    "master_port": _LAUNCH, "master_addr": _LAUNCH, "include": _LAUNCH, "exclude": _LAUNCH, "hostfile": _LAUNCH,
    "ddp_find_unused_parameters": _FAST, "packing": _PACKED,
}  # fmt: skip

TOOLS: dict[str, Tool] = {
    "DeepSpeed-Chat": Tool(
        ("num_padding_at_beginning", "actor_model_name_or_path", "training/step", "data_split", "data_output_path"),
        {
            **_COMMON, "model_name_or_path": "@model.from", "actor_model_name_or_path": "@model.from",
            "critic_model_name_or_path": "@judge.from", "data_path": "@data", "data_split": "@split",
            "sft_only_data_path": "@data", "zero_stage": "@parallel.zero", "actor_zero_stage": "@parallel.zero",
            "critic_zero_stage": "@critic.zero", "dtype": "@model.dtype", "offload": "@offload",
            "num_gpus": "@gpus", "num_nodes": "@nodes",
            "actor_gradient_checkpointing": "@parallel.gradient_checkpointing",
            "critic_gradient_checkpointing": "@critic.gradient_checkpointing",
            "per_device_training_batch_size": "@micro", "per_device_mini_train_batch_size": "@micro",
            "per_device_generation_batch_size": "@generation", "per_device_train_batch_size": "@micro",
            "generation_batches": "@generations", "max_seq_len": "length", "learning_rate": "lr",
            "max_prompt_seq_len": "rollout.prompt", "max_answer_seq_len": "rollout.answer",
            "ppo_epochs": "update.epochs", "actor_learning_rate": "actor.lr", "critic_learning_rate": "critic.lr",
            "actor_weight_decay": "actor.weight_decay", "critic_weight_decay": "critic.weight_decay",
            "lr_scheduler_type": "@schedule", "num_warmup_steps": "@warmup", "enable_ema": "@ema",
            "unsupervised_dataset_name": "@ptx.data", "unsupervised_dataset_config_name": "@ptx.subset",
            "unsup_coef": "ptx.weight", "weight_decay": "weight_decay", "num_train_epochs": "epochs",
            **{f"{who}lora_{name}": f"@{who}lora.{field}" for who in ("", "actor_", "critic_") for name, field in (
                ("dim", "rank"), ("module_name", "targets"), ("learning_rate", "lr"),
            )},
            "only_optimize_lora": "@lora.only",
        },
        {
            **_COMMON_WITHOUT, "data_output_path": _LOAD, "local_rank": _LAUNCH,
            "enable_mixed_precision_lora": _FAST, "num_padding_at_beginning": "padding is told by lengths",
            "offload_reference_model": "offload = idle in a `parallel` block that `ref` and `reward` name",
            "enable_hybrid_engine": _FAST, "inference_tp_size": _TENSOR, "tp_gather_partition_size": _ENGINE,
            "unpin_actor_parameters": _ENGINE, "release_inference_cache": _ENGINE, "print_loss": _HOOKS,
            "enable_tensorboard": _HOOKS, "tensorboard_path": _HOOKS, "print_answers": _HOOKS,
            "print_answers_interval": _HOOKS, "compute_fp32_loss": "losses are always in fp32",
            "disable_dropout": _DROPOUT,
            "disable_actor_dropout": _DROPOUT,
            "disable_critic_dropout": _DROPOUT,
            "actor_dropout": "the actor of PPO has no dropout", "critic_dropout": _DROPOUT,
            "end_of_conversation_token": "the chat template has it", "add_eot_token": "the chat template has it",
            "align_overflow": _FAST, "eval_interval": _INTERVAL, "eval_iters": _DERIVED,
            "enable_test_mode": "", "test_stop_step": "",
        },
    ),
    "OpenRLHF": Tool(
        ("openrlhf",),
        {
            **_COMMON, "pretrain": "@model.from", "reward_pretrain": "@judge.from", "critic_pretrain": "@judge.from",
            "dataset": "@data", "prompt_data": "@data", "zero_stage": "@parallel.zero", "max_len": "length",
            "micro_train_batch_size": "@micro", "train_batch_size": "@batch", "rollout_batch_size": "rollout.batch",
            "n_samples_per_prompt": "rollout.answers", "prompt_max_len": "rollout.prompt",
            "generate_max_len": "rollout.answer", "actor_num_gpus_per_node": "@gpus", "actor_num_nodes": "@nodes",
            "adam_offload": "@offload", "param_dtype": "@model.dtype", "save_path": "@recipe.output",
            "init_kl_coef": "kl.coef", "eps_clip": "update.clip", "value_clip": "update.value_clip",
            "lambd": "update.lambda", "gamma": "update.gamma", "max_epochs": "@epochs", "num_episodes": "epochs",
            "lr_scheduler": "@schedule", "lr_warmup_ratio": "@warmup", "actor_learning_rate": "actor.lr",
            "critic_learning_rate": "critic.lr", "learning_rate": "lr", "l2": "@weight_decay", "ema_beta": "actor.ema",
            "ptx_coef": "ptx.weight", "pretrain_data": "@ptx.data", "temperature": "rollout.temperature",
            "top_p": "@top_p", "rollout.top_p": "@top_p", "rollout.temperature": "rollout.temperature",
            "normalize_reward": "reward.normalize", "max_samples": "@rows", "logging_steps": "every.log",
            "actor.model_name_or_path": "@model.from", "reward.model_name_or_path": "@judge.from",
            "critic.model_name_or_path": "@judge.from", "actor.adam.lr": "actor.lr", "critic.adam.lr": "critic.lr",
            "adam.lr": "lr", "train.batch_size": "@batch", "rollout.batch_size": "rollout.batch",
            "rollout.n_samples_per_prompt": "rollout.answers", "ds.zero_stage": "@parallel.zero",
            "algo.kl.init_coef": "kl.coef", "data.prompt_dataset": "@data", "data.dataset": "@data",
            "data.max_len": "length", "actor.num_gpus_per_node": "@gpus", "actor.num_nodes": "@nodes",
            "train.micro_batch_size": "@micro", "reward.normalize_enable": "reward.normalize",
            "lora_rank": "@lora.rank", "lora_alpha": "@lora.alpha", "lora_dropout": "@lora.dropout",
            "target_modules": "@lora.targets", "ds.lora.rank": "@lora.rank", "ds.lora.alpha": "@lora.alpha",
            "ds.lora.dropout": "@lora.dropout", "ds.lora.target_modules": "@lora.targets",
            "load_in_4bit": "@lora.base", "ds.load_in_4bit": "@lora.base",
            **{f"{before}{role}_key": f"@columns.{role}" for before in ("", "data.") for role in
               ("input", "prompt", "chosen", "rejected")},
        },
        {
            **_COMMON_WITHOUT, "apply_chat_template": _TEMPLATE,
            "data.apply_chat_template": _TEMPLATE, "flash_attn": _FAST,
            "packing_samples": _PACKED, "ds.packing_samples": _PACKED, "micro_rollout_batch_size": _DERIVED,
            "vllm_num_engines": _ENGINE, "vllm_tensor_parallel_size": _TENSOR, "colocate_all_models": _ENGINE,
            "vllm_gpu_memory_utilization": _ENGINE, "vllm_enable_sleep": _ENGINE, "deepspeed_enable_sleep": _ENGINE,
            "vllm_sync_backend": _ENGINE, "enforce_eager": _ENGINE, "vllm.num_engines": _ENGINE,
            "vllm.tensor_parallel_size": _TENSOR, "vllm.gpu_memory_utilization": _ENGINE, "vllm.sync_backend": _ENGINE,
            "vllm.enforce_eager": _ENGINE, "vllm.enable_sleep": _ENGINE, "ds.enable_sleep": _ENGINE,
            "train.colocate_all": _ENGINE, "train.dynamic_batch_enable": _DERIVED, "train.max_tokens_per_gpu": _DERIVED,
            "ref_num_nodes": _ENGINE, "ref_num_gpus_per_node": _ENGINE, "reward_num_nodes": _ENGINE,
            "reward_num_gpus_per_node": _ENGINE, "critic_num_nodes": _ENGINE, "critic_num_gpus_per_node": _ENGINE,
            "ref.num_gpus_per_node": _ENGINE, "reward.num_gpus_per_node": _ENGINE, "critic.num_gpus_per_node": _ENGINE,
            "use_wandb": _HOOKS, "use_tensorboard": _HOOKS, "ckpt_path": _SAVE, "load_checkpoint": _SAVE,
            "save_hf_ckpt": _SAVE, "advantage_estimator": "", "algo.advantage.estimator": "",
        },
    ),
    "axolotl": Tool(
        ("base_model:", "micro_batch_size:"),
        {
            **_COMMON, "base_model": "@model.from", "revision_of_model": "@model.revision", "datasets": "@data",
            "micro_batch_size": "@micro", "sequence_len": "length", "num_epochs": "epochs", "max_steps": "steps",
            "lr_scheduler": "@schedule", "warmup_steps": "@warmup", "warmup_ratio": "@warmup",
            "max_grad_norm": "grad_clip", "learning_rate": "lr", "weight_decay": "weight_decay",
            "train_on_inputs": "@inputs", "logging_steps": "every.log", "adapter": "@lora.kind",
            "lora_r": "@lora.rank", "lora_alpha": "@lora.alpha", "lora_dropout": "@lora.dropout",
            "lora_target_modules": "@lora.targets", "lora_target_linear": "@lora.all", "load_in_4bit": "@lora.base",
        },
        {
            **_COMMON_WITHOUT, "val_set_size": _PART,
            "dataset_prepared_path": _LOAD, "sample_packing": _PACKED, "eval_sample_packing": _PACKED,
            "pad_to_sequence_len": _DERIVED, "lora_model_dir": _LORA,
            "lora_modules_to_save": _LORA, "load_in_8bit": _WHOLE, "flash_attention": _FAST,
            "xformers_attention": _FAST, "sdp_attention": _FAST, "attn_implementation": _FAST,
            "optimizer": "the optimizer is AdamW",
            "wandb_project": _HOOKS, "wandb_entity": _HOOKS, "wandb_watch": _HOOKS, "wandb_name": _HOOKS,
            "wandb_log_model": _HOOKS, "evals_per_epoch": _INTERVAL, "saves_per_epoch": _SAVE,
            "strict": "what is wrong is always an error", "special_tokens": "the tokenizer's own",
            "gradient_checkpointing_kwargs": _FAST, "model_type": _DERIVED, "tokenizer_type": _DERIVED,
            "trust_remote_code": _CODE, "fsdp": "ZeRO", "fsdp_config": "ZeRO",
            "context_parallel_size": _ONE,
            "sequence_parallel_degree": _ONE,
            "tensor_parallel_size": "a layer stays on one GPU", "chat_template": "the model's template",
            "rl": "", "plugins": "", "group_by_length": _DERIVED, "early_stopping_patience": "",
            "local_rank": _LAUNCH, "is_falcon_derived_model": _DERIVED, "debug": "",
            "shuffle_merged_datasets": "a blend is shuffled",
            "auto_resume_from_checkpoints": "`rlhf run` goes on by itself", "reward_model": "",
        },
    ),
    "LLaMA-Factory": Tool(
        ("finetuning_type", "cutoff_len", "llamafactory"),
        {
            **_COMMON, "model_name_or_path": "@model.from", "reward_model": "@judge.from", "dataset": "@data",
            "cutoff_len": "@length", "num_train_epochs": "epochs", "max_steps": "steps", "learning_rate": "@lr",
            "lr_scheduler_type": "@schedule", "warmup_ratio": "@warmup", "warmup_steps": "@warmup",
            "max_grad_norm": "@grad_clip", "max_samples": "@rows", "logging_steps": "every.log",
            "max_new_tokens": "rollout.answer", "ppo_epochs": "update.epochs", "ppo_target": "kl.target",
            "top_k": "@top_k", "top_p": "@top_p",
            "train_on_prompt": "@inputs", "weight_decay": "@weight_decay", "finetuning_type": "@lora.kind",
            "lora_rank": "@lora.rank", "lora_alpha": "@lora.alpha", "lora_dropout": "@lora.dropout",
            "lora_target": "@lora.targets", "quantization_bit": "@lora.base",
        },
        {
            **_COMMON_WITHOUT, "stage": "", "pref_loss": "", "additional_target": _LORA,
            "template": "the model's own chat template is applied", "plot_loss": _HOOKS, "val_size":
            _PART, "dataset_dir": "`from` of a data block", "flash_attn": _FAST, "ppo_buffer_size": _DERIVED,
            "ppo_score_norm": "normalize = on in the stage's reward", "ppo_whiten_rewards": "rewards are not whitened",
            "trust_remote_code": _CODE, "reward_model_type": "a reward model is whole",
        },
    ),
    "TRL": Tool(
        ("trl ", "accelerate launch", "examples/scripts/ppo", "sft_model_path", "dataset_name"),
        {
            **_COMMON, "model_name_or_path": "@model.from", "sft_model_path": "@model.from",
            "reward_model_path": "@judge.from", "model_revision": "@model.revision", "dataset_name": "@data",
            "dataset_config": "@subset", "dataset_train_split": "@data_split", "learning_rate": "@lr",
            "max_length": "@length", "max_seq_length": "@length", "num_train_epochs": "epochs", "max_steps": "@steps",
            "lr_scheduler_type": "@schedule", "warmup_ratio": "@warmup", "warmup_steps": "@warmup",
            "max_grad_norm": "@grad_clip", "num_ppo_epochs": "update.epochs", "kl_coef": "kl.coef",
            "response_length": "rollout.answer", "cliprange": "update.clip", "cliprange_value": "update.value_clip",
            "vf_coef": "update.value_weight", "gamma": "update.gamma", "lam": "update.lambda",
            "missing_eos_penalty": "@missing_eos", "temperature": "rollout.temperature", "logging_steps": "every.log",
            "torch_dtype": "@model.dtype", "dtype": "@model.dtype", "num_processes": "@gpus", "num_machines": "@nodes",
            "weight_decay": "@weight_decay", "num_mini_batches": "@minibatches", "use_peft": "@lora.kind",
            "lora_r": "@lora.rank", "lora_alpha": "@lora.alpha", "lora_dropout": "@lora.dropout",
            "lora_target_modules": "@lora.targets", "load_in_4bit": "@lora.base",
        },
        {
            **_COMMON_WITHOUT, "dataset_test_split": "evaluate on a part of a blend: `eval = blend.NAME.eval`",
            "lora_modules_to_save": _LORA, "load_in_8bit": _WHOLE,
            "attn_implementation": _FAST, "total_episodes": "a count of rollouts: rollouts = 100",
            "local_rollout_forward_batch_size": _DERIVED, "stop_token": "the model's own end tokens", "config_file": "",
            "whiten_rewards": "rewards are not whitened", "remove_unused_columns": _DERIVED,
            "trust_remote_code": _CODE, "num_labels": "a reward model has one number",
            "use_flash_attention_2": _FAST, "loss_type": "",
            "config": "a file of settings: `rlhf import` it", "max_prompt_length": "pairs are cut at `length`",
            "center_rewards_coefficient": "normalize shifts the reward",
        },
    ),
}  # fmt: skip


@cache
def aliases(tool: str, stage: str) -> dict[str, str]:
    """The targets of names that the table lists for a tool, for a kind of stage."""
    found: dict[str, str] = {}
    stage_type = f"stage.{stage}"
    for type_ in schema.types():
        own = type_ == stage_type or type_.startswith(stage_type + ".")
        if not own and type_ not in ("parallel",):
            continue
        before = "@parallel." if type_ == "parallel" else type_.removeprefix(stage_type).lstrip(".") + "."
        for attr in schema.definition(type_).attributes.values():
            for name in attr.aliases.get(tool, ()):
                found.setdefault(name, before.lstrip(".") + attr.name)
    return found
