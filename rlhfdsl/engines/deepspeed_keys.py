"""The key table of the `deepspeed { }` escape, grammar/deepspeed.schema.json, made from the installed DeepSpeed.

Types, bounds and most of the docs come from DeepSpeed's own config models, the top-level keys from what
`DeepSpeedConfig` asks of the dict that it is given. By hand are only the decisions: what the plan derives, what has no
part in a run, what a key needs to have an effect, and docs of keys that DeepSpeed describes nowhere.

`python -c "from rlhfdsl.engines import deepspeed_keys; deepspeed_keys.write()"` makes the file anew; a test fails
when it is older than the pinned DeepSpeed.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from rlhfdsl.language.resources import resource

_DERIVED = {
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

_MASTER = "the memory model counts fp32 master weights and moments"
_CURRICULUM = "what a stage reads is `data`, in an order that the seed gives"
_UNUSED = {
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
        "curriculum_learning": _CURRICULUM,
        "data_efficiency": _CURRICULUM,
        "dataloader_drop_last": _CURRICULUM,
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
        "immediate_grad_update": "gradients are summed in fp32 and applied at the step",
        "bf16_master_weights_and_grads": _MASTER,
        "bf16_optimizer_states": _MASTER,
    },
    "fp16": {"fp16_master_weights_and_grads": _MASTER},
    "comms_logger": {"prof_ops": "`prof_all` logs all of them"},
}

# What a key needs beside it to have an effect (planning/escape.py checks it).
_ZERO_3 = ("sub_group_size", "memory_efficient_linear", "zero_quantized_weights")
_ZERO_3 += ("zero_quantized_nontrainable_weights", "zero_quantized_gradients")
_ZERO_12 = ("allgather_partitions", "allgather_bucket_size", "round_robin_gradients", "parameter_alignment")
_ZERO_12 += ("use_multi_rank_bucket_allreduce", "ignore_unused_parameters")
_NVME = ("buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init")
_RESULT = ("zero_quantized", "communication_data_type", "prescale", "predivide", "fp16.", "bf16.")
_LOGS = ("comms_logger", "tensorboard", "wandb", "csv_monitor", "flops_profiler")

_DOCS = {
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
_CHOICES = {
    "communication_data_type": ["fp32", "fp16", "bf16"],
    "log_level": ["debug", "info", "warning", "error", "critical"],
}
_EXAMPLES = {"module_depth": "-1", "output_file": '"flops.txt"', "group": '"mine"', "team": '"mine"'}
_EXAMPLES |= {"output_path": '"runs/logs"', "project": '"mine"', "job_name": '"mine"'}
_LARGEST = 10**12  # of an integer that DeepSpeed does not bound


def generate() -> str:
    """The text of the file: a definition for each block, in the shape of grammar/recipe.schema.json."""
    import deepspeed

    definitions = {path: _definition(path, keys) for path, keys in _sections().items()}
    out = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "keys of deepspeed { }",
        "description": f"Generated from DeepSpeed {deepspeed.__version__} by rlhfdsl/engines/deepspeed_keys.py.",
        "$defs": {_type(path): definition for path, definition in definitions.items()},
    }
    return json.dumps(out, indent=1, ensure_ascii=False) + "\n"


def write() -> None:
    """Write the file anew."""
    (resource("grammar") / "deepspeed.schema.json").write_text(generate(), encoding="utf-8")


def _type(path: str) -> str:
    return f"deepspeed.{path}" if path else "deepspeed"


# ---- what DeepSpeed has


def _sections() -> dict[str, dict[str, dict[str, Any]]]:
    """Block: its keys, each {"schema", "doc", "alias"}, or {} for one that is known by name only."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling import config as profiling
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    models |= {"comms_logger": CommsLoggerConfig, "tensorboard": TensorBoardConfig, "wandb": WandbConfig}
    models |= {"csv_monitor": CSVConfig}
    profiler: dict[str, Any] = {}
    _recording(profiling, profiler, lambda: profiling.DeepSpeedFlopsProfilerConfig({}))
    plain = {"flops_profiler": profiler, "aio": AIO_DEFAULT_DICT}
    top = _top()
    out: dict[str, dict[str, dict[str, Any]]] = {
        "": {name: {} if name in models or name in plain else _by_default(name, top[name]) for name in top}
    }
    for name, model in models.items():
        out |= _model(name, model)
    for name, defaults in plain.items():
        out[name] = {key: _by_default(key, value) for key, value in defaults.items()}
    return out


class _Asked(dict[str, Any]):
    """A configuration that remembers which keys it was asked for, and with which default."""

    def __init__(self, **given: Any) -> None:
        super().__init__(given)
        self.asked: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        if self.asked.get(key) is None:
            self.asked[key] = default
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self


def _top() -> dict[str, Any]:
    """Every top-level key that DeepSpeed asks for, with its default."""
    from deepspeed.runtime import config as runtime

    given = _Asked(train_batch_size=1)
    kept = runtime.dist.get_rank, runtime.dist.get_world_size
    runtime.dist.get_rank, runtime.dist.get_world_size = lambda *_: 0, lambda *_: 1
    try:
        runtime.DeepSpeedConfig(given)
    finally:
        runtime.dist.get_rank, runtime.dist.get_world_size = kept
    return dict(sorted(given.asked.items()))


def _recording(module: types.ModuleType, into: dict[str, Any], make: Any) -> None:
    """What `make` asks of a dict by the module's `get_scalar_param`."""
    kept = module.get_scalar_param

    def asked(given: Any, key: str, default: Any) -> Any:
        into[key] = default
        return default

    module.get_scalar_param = asked  # type: ignore[attr-defined]
    try:
        make()
    finally:
        module.get_scalar_param = kept  # type: ignore[attr-defined]


def _model(path: str, model: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """The keys of a pydantic model, and of those inside it, by path."""
    docs = _docstrings(model)
    keys: dict[str, dict[str, Any]] = {}
    inner: dict[str, dict[str, dict[str, Any]]] = {}
    for field, info in model.model_fields.items():
        name = info.alias or field
        nested = next((a for a in _alternatives(info.annotation) if hasattr(a, "model_fields")), None)
        if nested is not None:
            keys[name] = {}
            if name not in _UNUSED.get(path, {}):
                inner |= _model(f"{path}.{name}", nested)
            continue
        alternatives = [a for a in (_schema(a, info.metadata) for a in _alternatives(info.annotation)) if a]
        keys[name] = {
            "schema": alternatives, "doc": docs.get(field, ""), "default": info.default,
            "alias": field if field != name else None,
        }  # fmt: skip
    return {path: keys} | inner


def _docstrings(model: Any) -> dict[str, str]:
    """The text below each field of a class, which pydantic does not keep."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(body, ast.ClassDef)
    out = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            out[field.target.id] = str(ast.literal_eval(after.value))
    return out


def _alternatives(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        yield from typing.get_args(annotation)
    else:
        yield annotation


def _schema(type_: Any, metadata: Any = ()) -> dict[str, Any]:
    bounds: dict[str, Any] = {}
    for one in metadata:
        for name, key in (("ge", "minimum"), ("gt", "exclusiveMinimum"), ("le", "maximum"), ("lt", "exclusiveMaximum")):
            if getattr(one, name, None) is not None:
                bounds[key] = getattr(one, name)
    if type_ is bool:
        return {"type": "boolean"}
    if type_ is int:
        if "exclusiveMinimum" in bounds:
            bounds["minimum"] = int(bounds.pop("exclusiveMinimum")) + 1
        return {"type": "integer", "minimum": 0, "maximum": _LARGEST} | bounds
    if type_ is float:
        return {"type": "number"} | (bounds or {"minimum": 0})
    if type_ is type(None):
        return {"const": None}
    if inspect.isclass(type_) and issubclass(type_, Enum):
        return {"enum": [one.value for one in type_]}
    if inspect.isclass(type_) and issubclass(type_, str | Path):
        return {"type": "string", "minLength": 1}
    return {}


def _by_default(name: str, default: Any) -> dict[str, Any]:
    """A key that DeepSpeed describes by its default alone."""
    if name in _CHOICES:
        return {"schema": [{"enum": _CHOICES[name]}], "doc": "", "default": default, "alias": None}
    least = {"module_depth": -1, "steps_per_print": 1}
    if name in least:
        integer = {"type": "integer", "minimum": least[name], "maximum": _LARGEST}
        return {"schema": [integer], "doc": "", "default": default, "alias": None}
    known = {"recompute_fwd_factor": float, "output_file": str}
    type_ = known.get(name, type(default))
    return {"schema": [_schema(type_)], "doc": "", "default": default, "alias": None}


# ---- what a recipe gets


def _definition(path: str, keys: dict[str, dict[str, Any]]) -> dict[str, Any]:
    derived, unused = _DERIVED.get(path, {}), _UNUSED.get(path, {})
    unknown = (derived.keys() | unused.keys()) - keys.keys()
    assert not unknown, f"DeepSpeed has no {unknown} in {path or 'its configuration'}"
    properties: dict[str, Any] = {}
    for name, key in keys.items():
        if name in derived or name in unused:
            continue
        whole = f"{path}.{name}" if path else name
        properties[name] = _property(whole, key) if key else {"$ref": f"#/$defs/{_type(whole)}"}
    title = path.rpartition(".")[2] or "deepspeed"
    about = "Settings passed on to DeepSpeed; the plan's own stand where nothing is written."
    return {
        "title": title,
        "description": about if not path else f"The part `{path}` of DeepSpeed's configuration.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "x-derived": derived,
        "x-unused": unused,
    }


def _property(path: str, key: dict[str, Any]) -> dict[str, Any]:
    section, _, name = path.rpartition(".")
    alternatives = key["schema"]
    assert alternatives and all(alternatives), f"no type for {path}"
    out: dict[str, Any] = {"description": _doc(name, key["doc"])}
    out |= alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}
    out["examples"] = [_EXAMPLES.get(name) or _example(alternatives[0], key["default"])]
    result = any(word in path for word in _RESULT)
    out["x-affects"] = "result" if result else "none" if section in _LOGS else "speed"
    needs = _needs(path, section, name)
    out |= {"x-needs": needs} if needs else {}
    out |= {"x-aliases": {"DeepSpeed": [key["alias"]]}} if key["alias"] else {}
    return out | {"x-deepspeed": path}


def _needs(path: str, section: str, name: str) -> str | None:
    if name in _NVME:
        return "nvme"
    if section in ("fp16", "bf16", "zero_optimization.offload_param", "zero_optimization.offload_optimizer"):
        return section.rpartition(".")[2]
    if section == "aio":
        return "nvme"
    if section == "zero_optimization":
        if name.startswith("stage3_") or name in _ZERO_3:
            return "zero 3"
        return "zero 1 2" if name in _ZERO_12 else "zero 1 2 3"
    return "zero 0" if name in ("prescale_gradients", "gradient_predivide_factor") else None


def _doc(name: str, text: str) -> str:
    """One sentence, as the table of the language has them: no capital at its head, no full stop at its end."""
    if name in _DOCS:
        return _DOCS[name]
    sentence = " ".join(text.replace("``", "`").split()).partition(". ")[0].rstrip(".").strip()
    assert sentence, f"no doc for {name}"
    return sentence if sentence[:2].isupper() else sentence[0].lower() + sentence[1:]


def _example(alternative: dict[str, Any], default: Any) -> str:
    if "enum" in alternative:
        return str(alternative["enum"][-1])
    if alternative["type"] == "boolean":
        return "off" if default is True else "on"
    if alternative["type"] == "string":
        return '"mine"'
    if default is None or default > 1e12:
        return "1_000_000"
    return f"{int(default):_}" if alternative["type"] == "integer" else f"{float(default):g}"
