"""What a stage is given: its part of the plan, its data and models, and a place to report and write to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlhfdsl.data.edge import load_edge
from rlhfdsl.engines import distributed
from rlhfdsl.engines.base import BasePolicy
from rlhfdsl.engines.checkpoint.keeper import Carries, Keeper
from rlhfdsl.engines.engine import Engine, PolicyEngine
from rlhfdsl.models.loading import load_model, make_scratch, partitioned
from rlhfdsl.models.tokenizers import generation_settings, load_tokenizer, stop_ids
from rlhfdsl.planning.checkpoints import pickles
from rlhfdsl.planning.flops import of_engine
from rlhfdsl.planning.keys import stamp
from rlhfdsl.planning.lock import pinned

AnyEngine = TypeVar("AnyEngine", bound=Engine)
Report = Callable[..., None]


@dataclass(frozen=True)
class Context:
    """A stage of the plan on this rank.

    base: the folder that the plan's input paths are relative to.
    directory: where the stage writes, a folder that becomes the plan's output when the stage is complete.
    report: called as report(event, **numbers) on every rank; only rank 0's calls are kept.
    resume: the checkpoint that the stage goes on from.
    pulse: called by the engines with what they begin to do, `actor: backward`.
    """

    plan: dict[str, Any]
    stage: dict[str, Any]
    base: Path
    directory: Path
    device: torch.device
    report: Report
    resume: Path | None = None
    pulse: Callable[[str], None] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return self.stage["settings"]

    @property
    def seed(self) -> int:
        return self.stage["seed"]

    @cached_property
    def model_entry(self) -> dict[str, Any]:
        """The plan's entry of the model whose tokenizer and template this stage's data is rendered with."""
        return self.plan["models"][self.stage["edges"]["train"]["model"]]

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.model_entry, self.base)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(stop_ids(self.tokenizer, generation_settings(self.model_entry, self.base)))

    @property
    def pad_id(self) -> int:
        """What fills the end of a row. It decides nothing: masks come from lengths."""
        return self.tokenizer.pad_token_id or 0

    def rows(self, edge: str) -> Sequence[Any]:
        """The rendered and tokenised rows of an edge (`train`, `eval`, `ptx`); empty when the stage has none."""
        entry = self.stage["edges"].get(edge)
        return load_edge(self.plan, entry, self.base, self.tokenizer) if entry else ()

    def shuffles(self, edge: str) -> bool:
        blend = self.plan["blends"].get(self.stage["edges"][edge]["source"])
        return blend["shuffle"] if blend else True

    def engine(self, name: str, kind: type[AnyEngine]) -> AnyEngine:
        """Load the model of an engine of the plan and put it on DeepSpeed."""
        spec = self.stage["engines"][name]
        source, revision, pickled = self._source(spec["weights"])
        if self.pulse is not None:
            self.pulse(f"{name}: loading")
        with partitioned(spec["deepspeed"]):
            module = load_model(
                spec, source, revision=revision, seed=self.seed, device=self.device, pickles=pickled
            )
        engine = kind(name, spec, module)
        engine.pulse = self.pulse or engine.pulse
        engine.flops = of_engine(self.plan, self.stage, name)
        return engine

    def reference(self, actor: PolicyEngine) -> PolicyEngine | BasePolicy:
        """The frozen policy `ref` of the plan: an engine of its own, or the actor's base with its adapters off."""
        spec = self.stage["engines"]["ref"]
        if not spec["shares"]:
            return self.engine("ref", PolicyEngine)
        base = BasePolicy(spec, actor)
        base.flops = of_engine(self.plan, self.stage, "ref")
        return base

    def keeper(self, engines: Mapping[str, Engine], updates: int, carries: Carries | None = None) -> Keeper:
        """The checkpoints of the stage: of the `engines` that train, and of what `carries` has beside them.

        updates: how many the stage makes (PPO: rollouts).
        """
        return Keeper(
            self.directory, engines, manifest=stamp(self.plan, self.stage), every=self.settings["checkpoint_every"],
            keep=self.settings["keep"], resume=self.resume, report=self.report, of=updates, carries=carries,
        )  # fmt: skip

    def weights_of(self, name: str) -> dict[str, str]:
        return self.stage["engines"][name]["weights"]

    def artifact(self, name: str) -> Path:
        """Where to write an artifact of this stage, inside `directory`."""
        return self.directory / Path(self.stage["artifacts"][name]).name

    def _source(self, weights: dict[str, str]) -> tuple[str, str | None, list[str]]:
        """A directory or hub id, the revision of a hub id, and the pickles that hold the weights where they do."""
        if "stage" in weights:
            maker = next(s for s in self.plan["stages"] if s["address"] == weights["stage"])
            return maker["artifacts"][weights["artifact"]], None, []
        address = weights["model"]
        entry = self.plan["models"][address]
        if entry["from"] is None:
            return str(self._scratch(address, entry)), None, []
        if "path" in entry["from"]:
            return str(self.base / entry["from"]["path"]), None, pickles(entry)
        return entry["from"]["hub"], pinned(entry["from"], entry["facts"])["revision"], pickles(entry)

    def _scratch(self, address: str, entry: dict[str, Any]) -> Path:
        """The directory of a model from scratch, made by the first stage that needs it."""
        seed = self.plan["recipe"]["seed"]
        digest = hashlib.sha256(f"{entry['key']} {seed} {address}".encode()).hexdigest()
        directory = Path(self.plan["recipe"]["output"]) / "models" / f"{address.split('.')[1]}-{digest[:8]}"
        if distributed.rank() == 0 and not directory.exists():
            partial = directory.with_suffix(".partial")
            make_scratch(entry, self.base, partial, int(digest[8:16], 16))
            partial.rename(directory)
        distributed.barrier()
        return directory


def micro_batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Slices of at most `size` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def due(every: int | None, update: int, updates: int) -> bool:
    """Whether to evaluate after update `update` (from 0). After the last one the stage evaluates anyway."""
    return every is not None and (update + 1) % every == 0 and update + 1 < updates
