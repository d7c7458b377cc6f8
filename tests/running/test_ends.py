"""How a run ends before its time: a rank that dies or hangs, a signal, a number that is none; and how it goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from pipeline import SFT_ONLY, write_recipe

from rlhfdsl.engines.checkpoint import store
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.running import failure, supervisor
from rlhfdsl.running.display import Display
from rlhfdsl.running.metrics import MetricsFollower
from rlhfdsl.running.watch import Pulse, Watch

ENDLESS = SFT_ONLY.replace("steps = 4", "steps = 100_000").replace("log = 1", "log = 1, checkpoint = 20")
STAGE = {"address": "stage.ppo", "kind": "ppo", "engines": {"actor": {}, "critic": {}}}


class Run:
    """`rlhf run small.rlhf` in a folder, in the background."""

    def __init__(self, folder: Path, *arguments: str):
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.partial = folder / "runs/small/sft.partial"
        self.family: list[psutil.Process] = []
        self.started = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhfdsl", "run", "small.rlhf", "--gpu", "cpu", *arguments],
            cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # A suite that runs in the background of a shell ignores SIGINT and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def events(self) -> list[dict]:
        return list(MetricsFollower(self.partial / "metrics.jsonl").new())

    def wait_for(self, event: str, count: int = 1) -> None:
        """Wait until this start wrote `count` such events."""
        deadline = time.time() + 300
        while time.time() < deadline and self.process.poll() is None:
            now = [found for found in self.events() if found["time"] >= self.started]
            if [found["event"] for found in now].count(event) >= count:
                break
            time.sleep(0.1)
        if self.process.poll() is None:
            self.family = psutil.Process(self.process.pid).children(recursive=True)

    def wait_for_rank(self) -> None:
        """Wait until a rank catches SIGUSR1, which it does when it is bound to its parent and before it loads torch."""
        deadline = time.time() + 300
        while time.time() < deadline and not any(map(catches, self.family)):
            time.sleep(0.05)
            self.family = psutil.Process(self.process.pid).children(recursive=True)

    def rank(self, number: int) -> int:
        return json.loads((self.partial / "ranks" / f"{number}.json").read_text())["pid"]

    def end(self, timeout: float) -> tuple[int, str]:
        """The exit code and the messages, when nothing of the run is left."""
        _, errors = self.process.communicate(timeout=timeout)
        assert "Traceback" not in errors and not psutil.wait_procs(self.family, timeout=20)[1]
        return self.process.returncode, errors

    def checkpoints(self) -> list[int]:
        found = [store.read(path) for path in store.all_of(self.partial / store.FOLDER)]
        return [manifest["update"] for manifest in found if isinstance(manifest, dict)]


def catches(process: psutil.Process) -> bool:
    """Whether a process has a handler for SIGUSR1, by what the system says of it."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:  # it has ended
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def test_two_ranks_meet_every_end(tmp_path):
    write_recipe(tmp_path, ENDLESS)
    run = Run(tmp_path, "--gpus", "2")
    run.wait_for("checkpoint", 2)
    assert len(run.family) >= 3  # the launcher and two ranks
    os.kill(run.rank(1), signal.SIGKILL)
    code, errors = run.end(30)
    assert code == failure.EXITS["E0791"], errors
    assert "stage.sft: rank 1 was killed by signal 9 (SIGKILL)" in errors
    assert "18 | stage sft {" in errors and f"the checkpoint after {run.checkpoints()[0]} of 100000 is kept" in errors

    kept = run.checkpoints()[0]
    run = Run(tmp_path, "--gpus", "2", "--patience", "5s")
    run.wait_for("update", 3)
    assert next(e for e in run.events() if e["event"] == "resume")["update"] == kept
    os.kill(run.rank(1), signal.SIGSTOP)
    code, errors = run.end(60)
    assert code == failure.EXITS["E0795"], errors
    assert "no progress for 5 s: rank 1 at policy: " in errors
    assert "its process is stopped; rank 0 at policy: " in errors
    assert "most recent call first" in (run.partial / "log.txt").read_text()

    run = Run(tmp_path, "--gpus", "2")
    run.wait_for("update", 3)
    for process in run.family:  # as Slurm and systemd do, to every process of the job
        process.send_signal(signal.SIGTERM)
    time.sleep(1)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    run.process.send_signal(signal.SIGINT)  # as `timeout` does, to its child and to the group
    code, errors = run.end(60)
    done = run.events()[-1]
    assert code == 130 and done["event"] == "stopped" and run.checkpoints()[0] == done["update"]
    assert f"stopped after {done['update']} of 100000 updates, with a checkpoint; run the same command" in errors
    assert not (tmp_path / "runs/small/sft").exists()


def test_an_only_rank_meets_every_end(tmp_path):
    write_recipe(tmp_path, ENDLESS)
    run = Run(tmp_path)
    run.wait_for("checkpoint")
    os.kill(run.rank(0), signal.SIGKILL)
    code, errors = run.end(30)
    assert code == failure.EXITS["E0791"] and "stage.sft: rank 0 was killed by signal 9 (SIGKILL)" in errors

    run = Run(tmp_path)
    run.wait_for("update", 3)
    for process in run.family:
        process.send_signal(signal.SIGTERM)
    time.sleep(1)
    run.process.send_signal(signal.SIGTERM)
    code, errors = run.end(60)
    done = run.events()[-1]
    assert code == 143 and done["event"] == "stopped" and run.checkpoints()[0] == done["update"]

    run = Run(tmp_path)
    run.wait_for("update", 3)
    run.process.send_signal(signal.SIGINT)
    time.sleep(supervisor.APART_SECONDS + 0.1)
    run.process.send_signal(signal.SIGINT)  # which may come when it has saved and ended
    assert run.end(60)[0] == 130


def test_a_killed_supervisor_leaves_no_orphans(tmp_path):
    write_recipe(tmp_path, ENDLESS)
    run = Run(tmp_path)
    run.wait_for_rank()
    assert len(run.family) == 1  # the rank, without a launcher
    run.process.kill()
    run.end(20)


def test_a_signal_that_comes_twice_asks_once(monkeypatch):
    with supervisor.Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked == signal.SIGTERM
        monkeypatch.setattr(supervisor, "APART_SECONDS", 0.0)
        with pytest.raises(supervisor.Interrupted, match="at once"):
            os.kill(os.getpid(), signal.SIGTERM)


def leave(folder: Path, rank: int, error: Exception, doing: str) -> None:
    failure.leave(folder, STAGE, rank, error, doing)


def explained(folder: Path, code: int = 1, **dead: int) -> UserError:
    watch = Watch(folder, 60)
    watch.dead = {int(rank[1:]): status for rank, status in dead.items()}
    return failure.explain(STAGE, folder, watch, code)


def test_memory_that_ran_out_names_the_rank_and_the_engine(tmp_path):
    leave(tmp_path, 0, RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:123"), "actor: backward")
    leave(tmp_path, 1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "critic: backward")
    error = explained(tmp_path)
    assert error.code == "E0790" and error.at == "stage.ppo.critic.parallel"
    assert "rank 1: the device ran out of memory: CUDA out of memory. Tried to allocate 2 GiB" in error.message


def test_memory_of_the_host_that_ran_out_is_not_the_devices(tmp_path):
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 50)
    leave(tmp_path, 0, found.value, "actor: loading")
    error = explained(tmp_path)
    assert error.code == "E0790" and error.at == "stage.ppo.actor.parallel"
    assert "rank 0: the host ran out of memory" in error.message


def test_a_disk_that_is_full_is_told_from_a_rank_that_died(tmp_path, monkeypatch):
    leave(tmp_path, 0, RuntimeError("Error while serializing: I/O error: No space left on device"), "actor: saving")
    error = explained(tmp_path)
    assert error.code == "E0798" and failure.EXITS[error.code] == 2
    assert error.message.startswith("stage.ppo, rank 0: a disk is full, at actor: saving: ")
    (tmp_path / "ranks/0.error.json").unlink()  # as where there was no room for this either
    assert explained(tmp_path).code == "E0791"
    monkeypatch.setattr(failure, "NO_ROOM", 1 << 60)
    assert explained(tmp_path).code == "E0798" and explained(tmp_path, 256 - signal.SIGKILL).code == "E0791"


def test_a_rank_that_is_gone_is_named_and_not_those_that_waited_for_it(tmp_path):
    leave(tmp_path, 0, RuntimeError("[gloo] Connection reset by peer"), "actor: step")
    error = explained(tmp_path, r0=1, r1=-signal.SIGKILL)
    assert error.code == "E0791" and "rank 1 was killed by signal 9 (SIGKILL)" in error.message
    error = explained(tmp_path, 256 - signal.SIGSEGV)  # nobody saw which
    assert "a rank was killed by signal 11 (SIGSEGV)" in error.message
    Pulse(tmp_path, 0)("actor: step")
    Pulse(tmp_path, 1)("actor: step")
    error = explained(tmp_path, 256 - signal.SIGKILL, r0=1)  # the launcher saw it first: of the rank that said nothing
    assert "rank 1 was killed by signal 9 (SIGKILL)" in error.message


def test_an_only_rank_that_its_supervisor_saw_die_is_named(tmp_path):
    assert "a rank was killed by signal 11 (SIGSEGV)" in explained(tmp_path, -signal.SIGSEGV).message
    Pulse(tmp_path, 0)("actor: step")
    assert "rank 0 was killed by signal 9 (SIGKILL)" in explained(tmp_path, -signal.SIGKILL).message
    assert "a rank ended with exit code 3" in explained(tmp_path, 3).message


def test_an_exit_code_that_is_no_signal(tmp_path):
    """130 is that of a program that Ctrl-C ended, or that says so; DeepSpeed's launcher gives 256 - signal."""
    assert "a rank ended with exit code 130 and left no message" in explained(tmp_path, 130).message


def test_how_a_rank_ended_is_read_before_anyone_asks_for_it(tmp_path):
    """Its parent may ask at any time, after which nobody else can know."""
    process = subprocess.Popen(["sleep", "60"])
    (tmp_path / "ranks").mkdir()
    entry = {"host": socket.gethostname(), "pid": process.pid, "doing": "actor: step"}
    (tmp_path / "ranks/1.json").write_text(json.dumps(entry))
    watch = Watch(tmp_path, 60)
    watch.wait(0.01)
    assert watch.dead == {}
    process.kill()
    started = time.monotonic()
    watch.wait(30)
    assert watch.dead == {1: -signal.SIGKILL} and time.monotonic() - started < 20
    process.wait()
    watch.wait(0.01)  # the end is seen once
    watch.close()


def test_a_number_that_is_none_points_at_the_rate(tmp_path):
    leave(tmp_path, 1, UserError("E0794", "the loss of `actor` is not finite in its update 3"), "actor: step")
    error = explained(tmp_path)
    assert (error.code, error.at) == ("E0794", "stage.ppo.actor.lr") and failure.EXITS[error.code] == 6


def test_a_mistake_of_the_user_comes_first_and_keeps_its_place(tmp_path):
    leave(tmp_path, 0, RuntimeError("Broken pipe"), "actor: step")
    leave(tmp_path, 1, UserError("E0801", "no such file", at="data.own.from", place="x:3", help="mend it"), "starting")
    error = explained(tmp_path)
    assert (error.code, error.at, error.place, error.help) == ("E0801", "data.own.from", "x:3", "mend it")


class Clock:
    """A clock that goes as the test says, for one who looks every second."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("rlhfdsl.running.watch.time.monotonic", lambda: self.now)

    def hangs(self, watch: Watch, seconds: int) -> bool:
        for _ in range(seconds):
            self.now += 1
            found = watch.hangs()
        return found


@pytest.mark.parametrize("signs", [0, 2])
def test_a_stage_hangs_when_no_rank_gives_a_sign(tmp_path, monkeypatch, signs):
    clock = Clock(monkeypatch)
    for rank in range(signs):
        Pulse(tmp_path, rank)(f"actor: part {rank}")
        os.utime(tmp_path / "ranks" / f"{rank}.json", (1, 100 - rank))
    watch = Watch(tmp_path, patience=10)
    assert not clock.hangs(watch, 10)
    assert clock.hangs(watch, 2) == bool(signs)
    assert clock.hangs(watch, 3600)
    assert watch.stalled() == ["rank 1 at actor: part 1", "rank 0 at actor: part 0"][:signs]
    Pulse(tmp_path, 0)("actor: step")
    assert not clock.hangs(watch, 1)


def test_a_clock_that_jumps_and_a_machine_that_sleeps_are_no_hang(tmp_path, monkeypatch):
    clock, watch, pulse = Clock(monkeypatch), Watch(tmp_path, patience=10), Pulse(tmp_path, 0)
    pulse("actor: forward")
    os.utime(pulse.path, (1, 1))  # the clock of a file server that is years behind, or one that was set since
    assert not clock.hangs(watch, 4)
    clock.now += 7200  # as where a laptop was closed for two hours
    assert not clock.hangs(watch, 1)
    pulse("actor: step")
    os.utime(pulse.path, (0, 0))  # a sign, whatever its time
    assert not clock.hangs(watch, 10)
    assert clock.hangs(watch, 2)


def test_a_pulse_is_written_at_most_once_a_second(tmp_path):
    pulse = Pulse(tmp_path, 0)
    pulse("a: forward")
    pulse("a: backward")
    assert json.loads(pulse.path.read_text())["doing"] == "a: forward" and pulse.doing == "a: backward"


def test_a_run_goes_on_when_nobody_reads_it(monkeypatch, capfd):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    os.close(reader)
    stage = {"address": "stage.sft", "batch": {"updates": 2}, "output": "runs/x/sft"}
    with Display() as display:
        display(stage, {"event": "launch", "do": "run", "reason": ""})
        display(stage, {"event": "done", "seconds": 1.0})
    assert capfd.readouterr().err == (
        "rlhf: stdout cannot be written any more (its reader is gone); the run goes on, and Ctrl-C stops it\n"
    )
    sys.stdout.close()
