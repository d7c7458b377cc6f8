"""Starting a stage's worker processes with DeepSpeed's launcher, and ending them."""

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

from rlhfdsl.engines.ports import free_port
from rlhfdsl.running import strict

GRACE_SECONDS = 5.0
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
    """Start the ranks of a stage; their output goes to `log`. The launcher ends all of them when one fails.

    checkpoint: the one to go on from, every file of it compared with its manifest. timeout: seconds that a rank waits
    for the others.
    """
    target = plan["target"]
    worker = [
        "--module", "rlhfdsl.running.worker",
        "--plan", str(plan_path), "--stage", stage["address"], "--base", str(base), "--timeout", str(timeout),
        *(["--checkpoint", str(checkpoint)] if checkpoint is not None else []),
    ]  # fmt: skip
    if target["nodes"] > 1:
        # DeepSpeed's runner reaches the other nodes of its hostfile by ssh.
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner",
            "--num_nodes", str(target["nodes"]), "--num_gpus", str(target["gpus"]), *worker,
        ]  # fmt: skip
    else:
        command = on_this_node(target["gpus"], [*worker, "--supervisor", str(os.getpid())])
    environment = surroundings(target["device"], target["gpus"]) | strict.environment(plan)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            # The launcher of several nodes has to take a signal to them, so it stays as it is.
            preexec_fn=_bound if target["nodes"] == 1 else die_with_parent,
        )


def on_this_node(ranks: int, worker: Sequence[str]) -> list[str]:
    """The command that starts so many ranks here, each of `worker`: --module, its name and its arguments."""
    slots = json.dumps({"localhost": list(range(ranks))}).encode()
    return [
        sys.executable, "-m", "deepspeed.launcher.launch",
        f"--world_info={base64.urlsafe_b64encode(slots).decode()}",
        "--master_addr=127.0.0.1", f"--master_port={free_port()}", *worker,
    ]  # fmt: skip


def surroundings(device: str, ranks: int) -> dict[str, str]:
    """The environment of the ranks of a node."""
    found = os.environ | {"DS_ACCELERATOR": device, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        # Nothing is compiled there, and DeepSpeed's look for Muon would import torch's compiler, seconds a rank.
        found.setdefault("TORCHDYNAMO_DISABLE", "1")
    if device == "cpu" and ranks > 1 and "OMP_NUM_THREADS" not in found:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    return found


def stop(process: subprocess.Popen[Any]) -> None:
    """End a launcher and all its ranks: a request first, force after `GRACE_SECONDS`. None is there afterwards."""
    if process.poll() is not None:
        with contextlib.suppress(OSError):  # what a launcher that died left behind
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
    """In a rank: from now on end at SIGTERM from its launcher or the supervisor, and from no other process.

    The launcher ends the ranks that are left when one failed. Where a process cannot tell who sent a signal, as on
    macOS, every SIGTERM ends it.
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
