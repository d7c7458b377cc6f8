"""`rlhf bench`: measure this machine into a profile that `rlhf plan --gpu PROFILE.json` plans with; `rlhf bench truth`
sets predictions beside measurements (truth.py), `rlhf bench rollout` times sampling (rollout.py)."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfdsl.cli import rollout, truth
from rlhfdsl.cli.common import OK, fail, say
from rlhfdsl.cli.planned import positive
from rlhfdsl.language.files import write_whole
from rlhfdsl.planning import hardware
from rlhfdsl.planning.rates import KIND, trained

if TYPE_CHECKING:
    import torch

HELP = "measure this machine, for plans that know how long it takes"
Json = dict[str, Any]
TRIALS = 5
LAYERS = 8


def configure(parser: argparse.ArgumentParser) -> None:
    about = "machine (default): its rates; truth: what plans predict beside what is measured; ppo: that of whole "
    about += "iterations; rollout: sampling's speed"
    whats = ("machine", "truth", "ppo", "rollout")
    parser.add_argument("what", nargs="?", choices=whats, default="machine", help=about)
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the profile (.json) or table (.md)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    ranks = "processes of the all-reduce (default: GPUs), or of each run of truth and ppo (default: 1)"
    parser.add_argument("--ranks", type=positive, metavar="N", help=ranks)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    truth.configure(parser)
    rollout.configure(parser)


def run(args: argparse.Namespace) -> int:
    if args.what in ("truth", "ppo"):
        return truth.run(args)
    if args.what != "rollout" and args.output is not None and not hardware.is_profile(args.output.name):
        fail(f"-o takes a name that ends in .json; `{args.output}` does not")
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        fail("this machine has no GPU that torch sees; try --device cpu")
    if args.what == "rollout":
        return rollout.run(args, device, _copy(device, (1024 if device == "cuda" else 128) << 20))
    ranks = args.ranks or (torch.cuda.device_count() if device == "cuda" else 1)
    if device == "cuda" and ranks > torch.cuda.device_count():
        fail(f"--ranks {ranks}: this machine has {torch.cuda.device_count()} GPUs")
    profile = measure(device, ranks)
    text = json.dumps(profile, indent=1) + "\n"
    if args.output is not None:
        try:
            write_whole(args.output, text)
        except OSError as error:
            fail(f"{args.output}: {error.strerror}")
    print(text if args.format == "json" else render(profile), end="")
    if args.output is not None and args.format == "text":
        print(f"\nplan with it: rlhf plan RECIPE --gpu {args.output}")
    return OK


def measure(device: str, ranks: int) -> Json:
    """The profile of this machine: GB/s, TFLOP/s and ms as medians of a few trials."""
    import torch

    here = hardware.detect() if device == "cuda" else hardware.CPU
    fast = device == "cuda"
    say("copy, matmul, host to device")
    mib = 1024 if fast else 128
    copied = _copy(device, mib << 20)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16} | ({"fp16": torch.float16} if fast else {})
    size = 8192 if fast else 512
    rates: dict[str, dict[str, float]] = {}
    for name, dtype in types.items():
        say(f"training step in {name}")
        rates[name] = {
            "matmul_tflops": _rounded(2 * size**3 / _seconds(_matmul(device, dtype, size), device) / 1e12),
            "train_tflops": _rounded(_training(device, dtype, fast)),
        }
    say("decode step")
    decode, forward = _layer_seconds(device)
    link = None
    if ranks > 1:
        say(f"all-reduce over {ranks} processes")
        link = _rounded(all_reduce(device, ranks) / 1e9)
    return {
        "kind": KIND, "version": 1, "device": device, "gpu": here.gpu, "memory": here.memory,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "copy_gb": _rounded(copied / 1e9),
        "host_gb": _rounded(_to_device(mib << 20) / 1e9) if fast else _rounded(copied / 1e9), "link_gb": link,
        "layer_decode_ms": _rounded(decode * 1e3), "layer_forward_ms": _rounded(forward * 1e3), "types": rates,
    }  # fmt: skip


def render(profile: Json) -> str:
    """A profile as text."""
    rows = [
        ("device", profile["gpu"] or f"{profile['device']}, {profile['threads']} threads"),
        ("copy", f"{profile['copy_gb']} GB/s, read and written"),
        ("host to device", f"{profile['host_gb']} GB/s"),
    ]
    if profile["link_gb"] is not None:
        rows.append(("all-reduce", f"{profile['link_gb']} GB/s of each device's link"))
    for name, rates in profile["types"].items():
        rows.append((f"matmul {name}", f"{rates['matmul_tflops']} TFLOP/s; a training step {rates['train_tflops']}"))
    rows.append(("decode step", f"{profile['layer_decode_ms']} ms for each layer at least"))
    rows.append(("forward pass", f"{profile['layer_forward_ms']} ms for each layer at least"))
    return "".join(f"{name:<16} {value}\n" for name, value in rows)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _seconds(work: Callable[[], Any], device: str) -> float:
    """Median seconds of one call, after a warm-up."""
    import torch

    def once() -> float:
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()
    once()
    return statistics.median(once() for _ in range(TRIALS))


def _copy(device: str, size: int) -> float:
    """Bytes/s of a copy within the device's memory, read and written counted."""
    import torch

    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / _seconds(lambda: b.copy_(a), device)


def _to_device(size: int) -> float:
    """Bytes/s from pinned memory of the host to the GPU."""
    import torch

    a = torch.ones(size, dtype=torch.uint8).pin_memory()
    b = torch.empty(size, dtype=torch.uint8, device="cuda")
    return size / _seconds(lambda: b.copy_(a, non_blocking=True), "cuda")


def _matmul(device: str, dtype: torch.dtype, size: int) -> Callable[[], Any]:
    import torch

    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return lambda: a @ b


def _model(device: str, dtype: torch.dtype, numbers: Json) -> Any:
    """A Llama of random weights; its vocabulary is small, so that the layers decide."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhfdsl.engines import norms

    config = LlamaConfig(
        vocab_size=numbers["vocab"], hidden_size=numbers["hidden"], intermediate_size=numbers["intermediate"],
        num_hidden_layers=numbers["layers"], num_attention_heads=numbers["heads"],
        max_position_embeddings=numbers["context"],
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    if device == "cuda":
        norms.in_one_kernel(model)  # as an engine does
    return model


def _training(device: str, dtype: torch.dtype, fast: bool) -> float:
    """TFLOP/s of forward and backward passes of a model, 6 for each parameter and token."""
    import torch

    model = _model(device, dtype, trained(device))
    rows, length = (16, 512) if fast else (2, 64)
    ids = torch.randint(0, 1024, (rows, length), device=device)

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    work = 6 * sum(p.numel() for p in model.parameters()) * rows * length
    return work / _seconds(step, device) / 1e12


def _layer_seconds(device: str) -> tuple[float, float]:
    """Seconds that one layer takes at least: in a step of `generate`, and in a forward pass that trains.

    By what LAYERS more of them take, so that what a model does once is not in it.
    """
    few, many = (_model_seconds(device, layers) for layers in (2, 2 + LAYERS))
    decode, forward = ((b - a) / LAYERS for a, b in zip(few, many, strict=True))
    return max(decode, 1e-6), max(forward, 1e-6)


def _model_seconds(device: str, layers: int) -> tuple[float, float]:
    """Seconds of a step of `generate` and of a forward pass of a model of so many narrow layers."""
    import torch
    from transformers import GenerationConfig

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    narrow = {"layers": layers, "hidden": 128, "heads": 2, "intermediate": 512}
    model = _model(device, dtype, trained(device) | narrow).eval()
    ids = torch.randint(3, 1024, (1, 8), device=device)
    steps = 16
    settings = GenerationConfig(max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        decode = _seconds(lambda: model.generate(ids, attention_mask=mask, generation_config=settings), device)
    return decode / steps, _seconds(lambda: model(input_ids=ids, use_cache=False), device)


def all_reduce(device: str, ranks: int, size: int = 64 << 20) -> float:
    """Bytes/s of each device's link in an all-reduce: 2 (n - 1) / n of the bytes pass it."""
    import os
    import tempfile

    import torch

    with tempfile.TemporaryDirectory() as folder:
        rendezvous, answer = os.path.join(folder, "meet"), os.path.join(folder, "seconds")
        torch.multiprocessing.spawn(_rank, (ranks, device, size, rendezvous, answer), nprocs=ranks)
        seconds = float(Path(answer).read_text())
    return 2 * (ranks - 1) / ranks * size / seconds


def _rank(rank: int, ranks: int, device: str, size: int, rendezvous: str, answer: str) -> None:
    import torch
    from torch import distributed

    place = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    values = torch.ones(size // 4, device=place)
    seconds = _seconds(lambda: distributed.all_reduce(values), device)
    if rank == 0:
        Path(answer).write_text(str(seconds))
    distributed.destroy_process_group()
