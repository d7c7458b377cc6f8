"""Starting a stage's worker processes, and ending them.

One rank is a process of its own; several are started by DeepSpeed's launcher, which stands between them and the
supervisor.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhfdsl.engines.ports import alone, free_port
from rlhfdsl.running import strict

GRACE_SECONDS = 5.0
# Rounds that a thread of GNU OpenMP waits busily for the others of a kernel, 300 000 where nobody says. With another
# program on two cores the quickstart's sft then came to a standstill; with so few it makes a fifth of what it makes
# alone, which is 7 % less than with all of them.
SPINS = 4000
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what asks a run to end


def start(
    plan: dict[str, Any],
    plan_path: Path,
    stage: dict[str, Any],
    base: Path,
    log: Path,
    checkpoint: Path | None,
    timeout: float,
) -> subprocess.Popen[bytes]:
    """Start the ranks of a stage; their output goes to `log`. Returns the launcher, which ends all of them when one
    fails, or the only rank.

    checkpoint: the one to go on from, every file of it compared with its manifest. timeout: seconds that a rank waits
    for the others.
    """
    target = plan["target"]
    worker = [
        "rlhfdsl.running.worker",
        "--plan", str(plan_path), "--stage", stage["address"], "--base", str(base), "--timeout", str(timeout),
        *(["--checkpoint", str(checkpoint)] if checkpoint is not None else []),
    ]  # fmt: skip
    if target["nodes"] > 1:
        # DeepSpeed's runner reaches the other nodes of its hostfile by ssh.
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner",
            "--num_nodes", str(target["nodes"]), "--num_gpus", str(target["gpus"]), "--module", *worker,
        ]  # fmt: skip
        environment = surroundings(target["device"], target["gpus"])
    else:
        worker += ["--supervisor", str(os.getpid())]
        command, environment = on_this_node(target["device"], target["gpus"], worker)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment | strict.environment(plan),
            start_new_session=True,
            # The launcher of several nodes has to take a signal to them, so it stays as it is.
            preexec_fn=_bound if target["nodes"] == 1 else die_with_parent,
        )


def on_this_node(device: str, ranks: int, worker: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command that starts so many ranks here, each of `worker`, a module and its arguments; and its environment."""
    environment, devices = surroundings(device, ranks), _devices(ranks)
    if ranks == 1:
        # DeepSpeed's launcher would import torch before this rank does, and look for its end once a second.
        environment |= alone() | {"CUDA_VISIBLE_DEVICES": devices[0]}
        return [sys.executable, "-m", *worker], environment
    slots = json.dumps({"localhost": devices}).encode()
    command = [
        sys.executable, "-m", "deepspeed.launcher.launch",
        f"--world_info={base64.urlsafe_b64encode(slots).decode()}",
        "--master_addr=127.0.0.1", f"--master_port={free_port()}", "--module", *worker,
    ]  # fmt: skip
    return command, environment


def _devices(ranks: int) -> list[str]:
    """The devices of so many ranks: the first that CUDA_VISIBLE_DEVICES names, or of all where it names too few."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:ranks] if len(named) >= ranks else [str(number) for number in range(ranks)]


def surroundings(device: str, ranks: int) -> dict[str, str]:
    """The environment of the ranks of a node, whoever starts them."""
    found = os.environ | {"DS_ACCELERATOR": device, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        # Nothing is compiled there, and DeepSpeed's look for Muon would import torch's compiler, seconds a rank.
        found.setdefault("TORCHDYNAMO_DISABLE", "1")
        if "OMP_WAIT_POLICY" not in found:
            found.setdefault("GOMP_SPINCOUNT", str(SPINS))
    if device == "cpu" and ranks > 1 and "OMP_NUM_THREADS" not in found:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    return found


def stop(process: subprocess.Popen[Any]) -> None:
    """End a rank or a launcher with all its ranks: a request first, force after `GRACE_SECONDS`.

    None is there afterwards.
    """
    if process.poll() is not None:
        with contextlib.suppress(OSError):  # what it left behind when it died
            os.killpg(process.pid, signal.SIGKILL)
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _bound() -> None:
    """Die with the parent, and hold back the signals that ask a run to end, here and in every process below.

    Slurm, systemd and others send them to each process of a job. They are for the supervisor, which has the ranks save.
    """
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def end_only_for(supervisor: int) -> None:
    """In a rank: from now on end at SIGTERM from its parent or the supervisor, and from no other process.

    A launcher is the parent of several ranks, and ends those that are left when one failed. Where a process cannot tell
    who sent a signal, as on macOS, every SIGTERM ends it.
    """
    if not hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    heard = {os.getppid(), supervisor}

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in heard:
            pass
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, name="end_only_for", daemon=True).start()


def die_with_parent() -> None:
    """On Linux, be killed when the parent dies, so that no rank outlives a killed run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
