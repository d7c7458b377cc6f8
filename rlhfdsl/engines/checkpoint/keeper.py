"""What of a stage is in a checkpoint, when one is due, and the way back.

A checkpoint lies between updates (PPO: rollouts). In it: every engine that trains, through DeepSpeed; and for each rank
its random generators and what the algorithm adds (averages, KL coefficient, the answers that the end is compared with).
The order of rows and the noise of sampling are functions of the update's number, so the number is their whole state. A
frozen engine is not saved: it is loaded from where it came.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from deepspeed import comm
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from rlhfdsl.engines import distributed
from rlhfdsl.engines.checkpoint import store
from rlhfdsl.engines.checkpoint.store import Files
from rlhfdsl.engines.engine import Engine

Json = dict[str, Any]


class Stopped(Exception):
    """The stage was asked to stop and did, after `update` of `of`; `saved` says whether a checkpoint is of it."""

    def __init__(self, update: int, of: int, saved: bool):
        super().__init__(f"stopped after update {update} of {of}")
        self.update, self.of, self.saved = update, of, saved


class Carries(Protocol):
    """A part of a stage with state of its own beside the engines."""

    def state(self) -> Json:
        """Tensors, numbers, texts, lists and dicts of them, of this rank."""

    def load_state(self, state: Json) -> None:
        """Take back what `state` gave."""


class Keeper:
    """The checkpoints of a stage on this rank.

    directory: the stage's folder. manifest: what the checkpoints are of, for the one who chooses among them.
    every: {"updates": N} or {"seconds": S}, None for only when asked to stop. keep: how many stay.
    resume: the checkpoint to go on from. report: as in Context. Every rank makes one, and calls it at the same updates.
    """

    def __init__(
        self,
        directory: Path,
        engines: Mapping[str, Engine],
        *,
        manifest: Json,
        every: Json | None,
        keep: int,
        resume: Path | None,
        report: Callable[..., None],
        of: int,
        carries: Carries | None = None,
        continued: Sequence[str] = ("metrics.jsonl", "samples.jsonl"),
    ):
        self.directory, self.root = directory, directory / store.FOLDER
        self.engines = engines
        self.device = next(iter(engines.values())).device
        self.manifest = manifest
        self.every = every or {}
        self.keep = keep
        self.resume = resume
        self.report = report
        self.of = of
        self.carries = carries
        self.continued = continued
        self.saved_at = time.monotonic()

    def restore(self) -> int:
        """Load the checkpoint to go on from; returns the number of updates that are done, 0 for a new start."""
        if self.resume is None:
            return 0
        started = time.perf_counter()
        for name, engine in self.engines.items():
            _load_engine(engine, self.resume, name)
        state = torch.load(
            self.resume / f"rank-{distributed.rank()}.pt", map_location="cpu", weights_only=True
        )
        for name, updates in state["updates"].items():
            self.engines[name].updates = updates
        if self.carries is not None:
            self.carries.load_state(state["carries"])
        _set_generators(state["generators"])
        self.saved_at = time.monotonic()
        self.report("resume", update=state["update"], of=self.of, seconds=time.perf_counter() - started)
        return int(state["update"])

    def after(self, update: int) -> None:
        """Called when `update` updates are done: saves when it is time to. Raises Stopped when the stage is to end."""
        due, stop = self._agreed(update)
        saved = self.save(update) if due or stop else False
        if stop:
            raise Stopped(update, self.of, saved)

    def save(self, update: int) -> bool:
        """Write a checkpoint; every rank calls it. When that fails, it is reported and the earlier ones stay."""
        started = time.perf_counter()
        partial = store.begin(self.root, update)
        files = Files(partial)
        tag = f"{update:08d}"
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            for name in self.engines:
                files.make(partial / name / tag)
        distributed.barrier()
        for name, engine in self.engines.items():
            _save_engine(engine, partial / name, tag, files)
        state = {
            "update": update,
            "updates": {name: engine.updates for name, engine in self.engines.items()},
            "carries": self.carries.state() if self.carries is not None else {},
            "generators": _generators(),
        }
        files.write(partial / f"rank-{distributed.rank()}.pt", lambda file: torch.save(state, file))
        everyone = distributed.gather_objects((files.entries, files.problem))
        problem = next((f"rank {rank}: {found}" for rank, (_, found) in enumerate(everyone) if found), None)
        if problem is None and distributed.rank() == 0:
            entries = {name: entry for part, _ in everyone for name, entry in part.items()}
            problem = self._commit(partial, update, entries)
        problem = distributed.from_first(problem)
        self.saved_at = time.monotonic()
        if problem is not None:
            if distributed.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self.report("checkpoint_failed", update=update, of=self.of, reason=problem)
            return False
        size = sum(entry.bytes for part, _ in everyone for entry in part.values())
        self.report(
            "checkpoint", update=update, of=self.of, bytes=size, seconds=time.perf_counter() - started
        )
        return True

    def _commit(self, partial: Path, update: int, entries: Mapping[str, store.Entry]) -> str | None:
        """On rank 0: the manifest and the name. Returns what went wrong."""
        try:
            positions = {name: _size_on_disk(self.directory / name) for name in self.continued}
            manifest = {**self.manifest, "update": update, "of": self.of, "continued": positions}
            store.commit(partial, manifest, entries)
        except OSError as error:
            return f"rank 0: {error.strerror or error}"
        store.prune(self.root, self.keep)
        return None

    def _agreed(self, update: int) -> tuple[bool, bool]:
        """Whether a checkpoint is due and whether to stop, as rank 0 sees it: clocks and folders differ."""
        due = "updates" in self.every and update % self.every["updates"] == 0
        if "seconds" in self.every:
            due = time.monotonic() - self.saved_at >= self.every["seconds"]
        stop = (self.directory / store.STOP).exists()
        decided = torch.tensor([due and update < self.of, stop], dtype=torch.int32, device=self.device)
        if distributed.world() > 1:
            comm.broadcast(decided, 0)
        return bool(decided[0]), bool(decided[1])


class _Through(CheckpointEngine):
    """DeepSpeed's way to files, with every file hashed and nothing read that the checkpoint does not list.

    left_out: names of a module's state that are not written.
    """

    def __init__(self, files: Files | None = None, left_out: frozenset[str] = frozenset()):
        super().__init__()
        self.files = files
        self.left_out = left_out

    def create(self, info: object) -> None:
        """DeepSpeed tells that it begins."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        if self.files is not None:
            self.files.make(Path(path))

    def save(self, state_dict: Json, path: str) -> None:
        if self.files is None:
            return
        module = state_dict.get("module")
        if module is not None:
            kept = {name: value for name, value in module.items() if name not in self.left_out}
            state_dict = {**state_dict, "module": kept}
        self.files.write(Path(path), lambda file: torch.save(state_dict, file))

    def load(self, path: str, map_location: Any = None) -> Json:
        # The one who chose this checkpoint compared every file with its manifest.
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: object) -> bool:
        return True


def _save_engine(engine: Engine, folder: Path, tag: str, files: Files) -> None:
    # DeepSpeed leaves out what is frozen, but by one name each, and a tied matrix has two.
    named = engine.module.named_parameters(remove_duplicate=False)
    frozen = frozenset(name for name, parameter in named if not parameter.requires_grad)
    held = engine.deepspeed.checkpoint_engine
    engine.deepspeed.checkpoint_engine = _Through(files, frozen)
    engine.deepspeed._copy_recovery_script = lambda path: None  # a script beside the data is no part of it
    try:
        engine.deepspeed.save_checkpoint(
            str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
        )
    finally:
        engine.deepspeed.checkpoint_engine = held
    # DeepSpeed copies what it keeps on NVMe by itself; the ranks share the reading of it.
    copied = sorted(path for path in (folder / tag / "offloaded_tensors").rglob("*") if path.is_file())
    for path in copied[distributed.rank() :: distributed.world()]:
        files.adopt(path)


def _load_engine(engine: Engine, checkpoint: Path, name: str) -> None:
    held = engine.deepspeed.checkpoint_engine
    engine.deepspeed.checkpoint_engine = _Through()
    try:
        found, _ = engine.deepspeed.load_checkpoint(
            str(checkpoint / name),
            tag=checkpoint.name,
            load_lr_scheduler_states=False,
            load_module_strict=not _has_frozen(engine),
        )
    finally:
        engine.deepspeed.checkpoint_engine = held
    if found is None:
        raise RuntimeError(f"DeepSpeed found nothing of `{name}` in {checkpoint}")


def _has_frozen(engine: Engine) -> bool:
    """Whether only a part trains (LoRA): the rest is not saved, it comes from where the engine came."""
    return not all(parameter.requires_grad for parameter in engine.module.parameters())


def _generators() -> Json:
    """The state of this rank's random generators, in types that torch loads without pickle."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def _set_generators(state: Json) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def _size_on_disk(path: Path) -> int:
    """A file's size, with what it holds forced to the disk; 0 when there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size
