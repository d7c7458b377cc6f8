"""What is decided by hand about DeepSpeed's keys, for deepspeed_keys.py: what the plan derives, what has no part in a
run, what a key needs to have an effect, and docs of keys that DeepSpeed describes nowhere.
"""

from __future__ import annotations

DERIVED = {
    "": {
        "train_batch_size": "it is `batch` in the stage, `update.minibatch` in PPO",
        "train_micro_batch_size_per_gpu": "it is `micro` in a `parallel` block",
        "gradient_accumulation_steps": "it is derived: batch / (micro x GPUs)",
        "managed_gradient_accumulation": "the trainer says when a step is due",
        "gradient_clipping": "it is `grad_clip` of the engine",
        "gradient_allreduce_op": "the trainer scales its losses for the mean",
        "optimizer": "AdamW's settings are `lr`, `betas`, `eps` and `weight_decay` of the engine",
        "scheduler": "it is `schedule` and `warmup` of the engine",
        "data_types": "gradients are summed in fp32",
        "zero_allow_untested_optimizer": "the optimizer is AdamW",
        "zero_force_ds_cpu_optimizer": "the optimizer follows from `offload` in a `parallel` block",
        "torch_autocast": "precision is `dtype` of the model",
        "amp": "precision is `dtype` of the model",
        "bfloat16": "precision is `dtype` of the model",
        "activation_checkpointing": "it is `gradient_checkpointing` in a `parallel` block, which is torch's own",
        "hybrid_engine": "the rollout engine is chosen from what the model and the parallelism allow",
        "checkpoint": "checkpoints are the run's: see `every` and `keep` in the stage",
        "tensor_parallel": "what a model is spread over is `parallel`",
    },
    "zero_optimization": {
        "stage": "it is `zero` in a `parallel` block",
        "overlap_comm": "it follows from `zero` and the GPUs: DeepSpeed takes it at stage 2 only, beside our losses",
        "cpu_offload": "it is `offload` in a `parallel` block",
        "cpu_offload_param": "it is `offload` in a `parallel` block",
        "cpu_offload_use_pin_memory": "it is `pin_memory` in `offload_optimizer` or `offload_param`",
        "stage3_gather_16bit_weights_on_model_save": "a run saves whole weights at every stage",
        "stage3_gather_fp16_weights_on_model_save": "a run saves whole weights at every stage",
        "load_from_fp32_weights": "master weights begin as the model's",
        "compute_grad_norm": "`grad_clip` needs the norm, and the metrics show it",
    },
    "zero_optimization.offload_param": {
        "device": "it is `offload` in a `parallel` block",
        "nvme_path": "it is `nvme` in a `parallel` block",
    },
    "zero_optimization.offload_optimizer": {
        "device": "it is `offload` in a `parallel` block",
        "nvme_path": "it is `nvme` in a `parallel` block",
    },
    "bf16": {"enabled": "precision is `dtype` of the model"},
    "fp16": {"enabled": "precision is `dtype` of the model", "auto_cast": "inputs are token ids"},
}

MASTER = "the memory model counts fp32 master weights and moments"
CURRICULUM = "what a stage reads is `data`, in an order that the seed gives"
UNUSED = {
    "": {
        "pipeline": "models are not cut into pipeline stages",
        "sequence_parallel_size": "sequences are not cut over GPUs",
        "seq_parallel_communication_data_type": "sequences are not cut over GPUs",
        "expert_parallel": "mixtures of experts are not planned",
        "use_data_before_expert_parallelism": "mixtures of experts are not planned",
        "elasticity": "another number of GPUs is another plan: plan the recipe again",
        "autotuning": "`rlhf plan --fit` proposes ZeRO, offload and micro batch",
        "compression_training": "models are trained as they are",
        "quantize_training": "models are trained as they are",
        "weight_quantization": "models are trained as they are",
        "progressive_layer_drop": "models are trained as they are",
        "eigenvalue": "models are trained as they are",
        "sparse_attention": "it is `attention` of the model",
        "sparse_gradients": "embeddings have dense gradients here",
        "curriculum_learning": CURRICULUM,
        "data_efficiency": CURRICULUM,
        "dataloader_drop_last": CURRICULUM,
        "compile": "engines are not compiled",
        "graph_harvesting": "engines are not captured in graphs",
        "disable_allgather": "DeepSpeed does not read it any more",
        "vocabulary_size": "DeepSpeed only warns by it",
        "nebula": "checkpoints are the run's: see `every` and `keep` in the stage",
        "datastates_ckpt": "checkpoints are the run's: see `every` and `keep` in the stage",
        "comet": "`tensorboard`, `wandb` and `csv_monitor` are what a recipe can ask for",
        "timers": "the record of a run has its times",
    },
    "zero_optimization": {
        "elastic_checkpoint": "DeepSpeed gave it up",
        "legacy_stage1": "DeepSpeed will give it up",
        "zenflow": "its updates lag behind, which no stage here allows for",
        "leaf_module": "mixtures of experts are not planned",
        "pipeline_loading_checkpoint": "a run loads its checkpoints itself",
        "override_module_apply": "models are made before the engine, so it has nothing to override",
        "save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
        "zero_hpz_partition_size": "the memory model does not count its second copy of the weights",
    },
    "zero_optimization.offload_optimizer": {
        "super_offload": "the optimizer on the host is DeepSpeed's CPU Adam",
        "cpuadam_cores_perc": "it belongs to `super_offload`, which is not used",
        "ratio": "an optimizer is offloaded whole",
    },
    "bf16": {
        "immediate_grad_update": "on at ZeRO 1, the only stage that has it",
        "bf16_master_weights_and_grads": MASTER,
        "bf16_optimizer_states": MASTER,
    },
    "fp16": {"fp16_master_weights_and_grads": MASTER},
    "comms_logger": {"prof_ops": "`prof_all` logs all of them"},
}

# What a key needs beside it to have an effect (planning/escape.py checks it).
ZERO_3 = ("sub_group_size", "memory_efficient_linear", "zero_quantized_weights")
ZERO_3 += ("zero_quantized_nontrainable_weights", "zero_quantized_gradients")
ZERO_12 = ("allgather_partitions", "allgather_bucket_size", "round_robin_gradients", "parameter_alignment")
ZERO_12 += ("use_multi_rank_bucket_allreduce", "ignore_unused_parameters")
NVME = ("buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init")
RESULT = ("zero_quantized", "communication_data_type", "prescale", "predivide", "fp16.", "bf16.")
LOGS = ("comms_logger", "tensorboard", "wandb", "csv_monitor", "flops_profiler")

DOCS = {
    "steps_per_print": "optimizer steps between DeepSpeed's own progress lines",
    "dump_state": "print the engine's state when it starts",
    "disable_python_gc": "switch Python's garbage collector off while the engine works",
    "communication_data_type": "the type in which gradients travel",
    "prescale_gradients": "divide gradients before they are summed over the GPUs, not after",
    "gradient_predivide_factor": "by how much gradients are divided before they are summed, with `prescale_gradients`",
    "wall_clock_breakdown": "print the time of forward, backward and step",
    "memory_breakdown": "print the memory at points of a step",
    "log_level": "what DeepSpeed's logger prints",
    "ignore_unused_parameters": "go on where a parameter got no gradient",
    "stage3_module_granularity_threshold": "modules with fewer parameters for each module inside are fetched whole",
    "loss_scale": "the factor of the loss; 0: dynamic",
    "zero_quantized_weights": "quantize weights for their all-gather (ZeRO++)",
    "zero_quantized_nontrainable_weights": "keep frozen weights quantized",
    "zero_quantized_gradients": "quantize gradients for their reduction (ZeRO++)",
    "round_robin_gradients": "with an optimizer on the host, share the copying of gradients out over the ranks",
    "enabled": "whether it is on",
    "prof_all": "log every collective",
    "verbose": "log each collective as it happens",
    "debug": "log the caller of each collective",
    "recompute_fwd_factor": "forward passes that checkpointing repeats, for the count of FLOPs",
    "profile_step": "the step that is profiled",
    "module_depth": "depth of modules that the profile tells; -1: all",
    "top_modules": "modules that its summary names",
    "detailed": "print the profile of each module",
    "output_file": "where the profile goes; left out, the terminal",
    "block_size": "bytes of one request to the NVMe drive",
    "queue_depth": "requests in flight",
    "intra_op_parallelism": "threads of one request",
    "single_submit": "submit requests one by one",
    "overlap_events": "submit requests while others are waited for",
    "use_gds": "read into GPU memory past the host (GPUDirect Storage)",
}
CHOICES = {
    "communication_data_type": ["fp32", "fp16", "bf16"],
    "log_level": ["debug", "info", "warning", "error", "critical"],
}
EXAMPLES = {"module_depth": "-1", "output_file": '"flops.txt"', "group": '"mine"', "team": '"mine"'}
EXAMPLES |= {"output_path": '"runs/logs"', "project": '"mine"', "job_name": '"mine"'}
