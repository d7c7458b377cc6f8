"""Checkpoints against faults: whatever breaks while one is written, a whole one is there afterwards."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rollouts import LORA, learn, tiny
from small import one_rank

from rlhfdsl.engines.checkpoint import store
from rlhfdsl.engines.checkpoint.keeper import Keeper, Stopped, _load_engine, _save_engine
from rlhfdsl.engines.checkpoint.store import Files

TRIES = 34  # of each of three kinds of fault


class Killed(BaseException):
    """The process is gone: nothing after this line of the program runs."""


class Saved:
    """An engine as a keeper sees it, with one tensor for its weights."""

    def __init__(self, value: float):
        self.deepspeed = self
        self.module = torch.nn.Linear(40, 40)
        torch.nn.init.constant_(self.module.weight, value)
        self.device, self.updates, self.checkpoint_engine = torch.device("cpu"), int(value), None

    def save_checkpoint(self, folder: str, tag: str, **options) -> None:
        self.checkpoint_engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        for name in ("model_states", "optim_states"):
            self.checkpoint_engine.save({"weight": self.module.weight.data}, f"{folder}/{tag}/{name}.pt")

    def load_checkpoint(self, folder: str, tag: str, **options) -> tuple[str, dict]:
        self.module.weight.data.copy_(self.checkpoint_engine.load(f"{folder}/{tag}/model_states.pt")["weight"])
        return folder, {}


@pytest.fixture(autouse=True)
def rank():
    one_rank()


def keeper(folder: Path, value: float, events: list, resume: Path | None = None, **options) -> Keeper:
    given = {"every": {"updates": 1}, "keep": 2} | options
    return Keeper(
        folder, {"policy": Saved(value)}, manifest={"key": "k"}, resume=resume, of=100,
        report=lambda event, **values: events.append((event, values)), **given,
    )  # fmt: skip


def newest(folder: Path) -> tuple[int, float] | None:
    """The update of the newest whole checkpoint, and the weight in it."""
    for path in store.all_of(folder / store.FOLDER):
        manifest = store.read(path)
        if not isinstance(manifest, str) and store.damage(path, manifest) is None:
            fresh = keeper(folder, 0.0, [], resume=path)
            assert fresh.restore() == manifest["update"] == fresh.engines["policy"].updates
            return manifest["update"], fresh.engines["policy"].module.weight[0, 0].item()
    return None


class Faults:
    """Counts what a checkpoint does to the disk, and lets operation number `at` go wrong."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, kind: str):
        self.count, self.at, self.kind = 0, at, kind
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "open"), (shutil, "rmtree"), (Path, "mkdir")):
            patch.setattr(owner, name, self.failing(getattr(owner, name)))
        write = store._Hashed.write
        patch.setattr(store._Hashed, "write", lambda file, data: self.write(write, file, data))

    def due(self) -> bool:
        self.count += 1
        return self.count == self.at

    def failing(self, function: Callable) -> Callable:
        def run(*arguments, **options):
            if self.due():
                if self.kind == "kill":
                    raise Killed
                if self.kind == "full" and options.get("ignore_errors"):
                    return None
                if self.kind == "full":
                    raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **options)

        return run

    def write(self, write: Callable, file: store._Hashed, data: bytes) -> int:
        if not self.due():
            return write(file, data)
        half = bytes(data)[: len(data) // 2]
        if self.kind == "short":  # what the file holds is less than what was taken
            file.file.write(half)
            file.sha256.update(data)
            file.bytes += len(data)
            return len(data)
        file.file.write(half)
        if self.kind == "kill":
            raise Killed
        error = OSError(errno.ENOSPC, "No space left on device")
        file.error = error
        raise error


@pytest.mark.parametrize("kind", ["full", "short", "kill"])
def test_a_whole_checkpoint_is_there_after_any_fault(tmp_path, monkeypatch, kind):
    with monkeypatch.context() as patch:
        counted = Faults(patch, -1, kind)
        keeper(tmp_path / "count", 1.0, []).save(1)
    chance = random.Random(kind)
    lost = 0
    for number in range(TRIES):
        folder = tmp_path / str(number)
        assert keeper(folder, 1.0, []).save(1) and keeper(folder, 2.0, []).save(2)
        events: list = []
        with monkeypatch.context() as patch:
            Faults(patch, chance.randint(1, counted.count), kind)
            try:
                done = keeper(folder, 3.0, events).save(3)
            except Killed:
                done = None
        found = newest(folder)
        # One that is not known to be there may be: its name is the last thing but one that reaches the disk.
        assert found in ([(3, 3.0)] if done else [(2, 2.0), (3, 3.0)]), number
        if done is False:
            ((event, values),) = events
            assert event == "checkpoint_failed" and values["reason"]
            lost += 1
        # The next one succeeds, and what was left of the broken one goes.
        assert keeper(folder, 4.0, []).save(4) and newest(folder) == (4, 4.0)
        assert len(store.all_of(folder / store.FOLDER)) == 2
        assert not list((folder / store.FOLDER).glob(".*"))
    assert kind == "kill" or lost > TRIES / 4  # the faults hit


def test_a_fault_is_told_in_words(tmp_path, monkeypatch):
    events: list = []
    with monkeypatch.context() as patch:
        Faults(patch, 8, "full")
        assert not keeper(tmp_path, 1.0, events).save(1)
    assert events == [("checkpoint_failed", {"update": 1, "of": 100, "reason": "rank 0: No space left on device"})]


def damaged(folder: Path, how: str) -> str:
    path = store.all_of(folder / store.FOLDER)[0]
    file = path / "policy" / path.name / "model_states.pt"
    match how:
        case "a flipped bit":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        case "a cut file":
            os.truncate(file, 100)
        case "a lost file":
            file.unlink()
        case "a lost manifest":
            (path / store.MANIFEST).unlink()
        case "a torn manifest":
            os.truncate(path / store.MANIFEST, 200)
        case "an edited manifest":
            manifest = json.loads((path / store.MANIFEST).read_text())
            (path / store.MANIFEST).write_text(json.dumps(manifest | {"update": 7}))
        case "a file of elsewhere":
            manifest = json.loads((path / store.MANIFEST).read_text())
            manifest["files"]["../../../secret"] = {"bytes": 1, "sha256": ""}
            del manifest["digest"]
            (path / store.MANIFEST).write_text(json.dumps(manifest | {"digest": store._digest(manifest)}))
    manifest = store.read(path)
    return manifest if isinstance(manifest, str) else str(store.damage(path, manifest))


HOW = (
    "a flipped bit", "a cut file", "a lost file", "a lost manifest", "a torn manifest", "an edited manifest",
    "a file of elsewhere",
)  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_the_one_before_a_damaged_one_is_used(tmp_path, how):
    for update in (1, 2):
        keeper(tmp_path, float(update), []).save(update)
    assert "00000002" in damaged(tmp_path, how)
    assert newest(tmp_path) == (1, 1.0)


def test_generators_and_counters_come_back(tmp_path):
    first = keeper(tmp_path, 5.0, [])
    torch.manual_seed(11)
    first.save(5)
    drawn = torch.rand(3)
    second = keeper(tmp_path, 0.0, [], resume=tmp_path / store.FOLDER / "00000005")
    torch.manual_seed(12)
    assert second.restore() == 5 and second.engines["policy"].updates == 5
    assert torch.equal(torch.rand(3), drawn)


def test_when_one_is_due(tmp_path):
    events: list = []
    by_count = keeper(tmp_path / "count", 1.0, events, every={"updates": 3}, keep=5)
    for update in range(1, 101):
        by_count.after(update)
    assert [v["update"] for e, v in events if e == "checkpoint"] == list(range(3, 100, 3))
    assert [p.name for p in store.all_of(tmp_path / "count" / store.FOLDER)][-1] == "00000087"  # the newest five
    by_time = keeper(tmp_path / "time", 1.0, events, every={"seconds": 1000.0})
    by_time.after(1)
    by_time.saved_at -= 1001
    by_time.after(2)
    by_time.after(3)
    assert [p.name for p in store.all_of(tmp_path / "time" / store.FOLDER)] == ["00000002"]
    never = keeper(tmp_path / "never", 1.0, events, every=None)
    never.after(1)
    (tmp_path / "never").mkdir()
    (tmp_path / "never" / store.STOP).touch()
    with pytest.raises(Stopped) as stopped:
        never.after(2)
    assert stopped.value.saved and stopped.value.update == 2
    assert [p.name for p in store.all_of(tmp_path / "never" / store.FOLDER)] == ["00000002"]


@pytest.mark.parametrize("zero", [0, 2])
def test_of_frozen_weights_nothing_is_saved(tmp_path, zero):
    """Not by a second name either, as the output matrix of tied embeddings has one; and adapters come back."""
    engine = tiny("llama", zero=zero, lora=LORA, tie_word_embeddings=True)
    assert engine.module.lm_head.weight is engine.module.model.embed_tokens.weight
    learn(engine)
    trained = {name: p.detach().clone() for name, p in engine.module.named_parameters() if p.requires_grad}
    (tmp_path / "7" / "actor").mkdir(parents=True)
    _save_engine(engine, tmp_path / "7" / "actor", "7", Files(tmp_path / "7"))
    (states,) = (tmp_path / "7").rglob("*model_states.pt")
    assert torch.load(states, weights_only=False)["module"].keys() == trained.keys()
    learn(engine)
    _load_engine(engine, tmp_path / "7", "actor")
    assert all(torch.equal(engine.module.get_parameter(name), value) for name, value in trained.items())
