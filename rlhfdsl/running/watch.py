"""Whether the ranks of a stage live and go on: each writes what it does to a file, which the supervisor looks at.

    ppo.partial/ranks/0.json        {"host", "pid", "doing"}, written anew at most once a second while the rank works
    ppo.partial/ranks/0.error.json  what it died of, if it could say so
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "ranks"  # in a stage's folder
BEAT_SECONDS = 1.0
LOADING_SECONDS = 3600.0  # until the first sign: a large model is read, perhaps from the hub
LOOK_SECONDS = 5.0  # of silence that one look adds at most: a machine that slept, or `rlhf run` stopped, is no hang
DUMP_SECONDS = 2.0  # for the ranks to write where they stand

Json = dict[str, Any]


class Pulse:
    """Tells that this rank goes on. Called by the engines with what they begin to do, hundreds of times a second."""

    def __init__(self, directory: Path, rank: int):
        self.path = directory / FOLDER / f"{rank}.json"
        self.doing = "starting"
        self.written = float("-inf")

    def __call__(self, doing: str) -> None:
        self.doing = doing
        if time.monotonic() - self.written < BEAT_SECONDS:
            return
        self.written = time.monotonic()
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "doing": doing})
        # On a full disk the rank still works; what ends the run then is what needs the disk.
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text, encoding="utf-8")


class Watch:
    """The ranks of a stage as the supervisor sees them.

    patience: seconds without a sign of any rank after which the stage is held to hang.
    """

    def __init__(self, directory: Path, patience: float):
        self.folder = directory / FOLDER
        self.patience = patience
        self.signs: set[tuple[str, int]] = set()  # the files of the ranks and when each was written
        self.silence = 0.0  # seconds that were waited since one of them changed
        self.looked = time.monotonic()
        self.dead: dict[int, int] = {}  # exit statuses by rank, negative for a signal, in the order of their ends
        self.handles: dict[int, int | None] = {}  # of the processes of this machine by pid; None when one has ended

    def look(self) -> None:
        """Notice which ranks of this machine ended with an error. A launcher sees it a second later, but not which
        rank it was, and ends the others."""
        for rank, found in self._ranks():
            status = exit_status(found["pid"]) if found["host"] == socket.gethostname() else 0
            if status:
                self.dead.setdefault(rank, status)

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until a rank of this machine ends: how it did can be read for a second at most."""
        poll = select.poll()
        for _, found in self._ranks():
            if found["host"] == socket.gethostname() and found["pid"] not in self.handles:
                self.handles[found["pid"]] = _handle(found["pid"])
        by_handle = {handle: pid for pid, handle in self.handles.items() if handle is not None}
        for handle in by_handle:
            poll.register(handle, select.POLLIN)
        ended = poll.poll(seconds * 1000)
        if ended:
            self.look()
        for handle, _ in ended:
            os.close(handle)
            self.handles[by_handle[handle]] = None

    def close(self) -> None:
        """Give the handles of the processes back."""
        for pid, handle in self.handles.items():
            if handle is not None:
                os.close(handle)
                self.handles[pid] = None

    def killed(self) -> tuple[int, int] | None:
        """The first rank that a signal ended, and the signal; not one that the launcher asked to end."""
        ends = ((rank, -status) for rank, status in self.dead.items() if status < 0)
        return next((end for end in ends if end[1] != signal.SIGTERM), None)

    def hangs(self) -> bool:
        """Whether no rank gave a sign for `patience` seconds, or for LOADING_SECONDS after the start.

        Asked over and over while the stage runs. A sign is a file that changed: what its time says, and how the clock
        of a file server or of this machine goes, do not matter.
        """
        signs = {(path.name, path.stat().st_mtime_ns) for path in self.folder.glob("*.json")}
        now = time.monotonic()
        self.silence = 0.0 if signs != self.signs else self.silence + min(now - self.looked, LOOK_SECONDS)
        self.signs, self.looked = signs, now
        return self.silence > (self.patience if signs else max(self.patience, LOADING_SECONDS))

    def stalled(self) -> list[str]:
        """What each rank did when it gave its last sign, the oldest sign first, in words."""
        found = []
        for rank, entry in self._ranks():
            here = entry["host"] == socket.gethostname()
            stopped = ", its process is stopped" if here and _state(entry["pid"]) in ("T", "t") else ""
            time_of = (self.folder / f"{rank}.json").stat().st_mtime
            found.append((not stopped, time_of, f"rank {rank} at {entry['doing']}{stopped}"))
        return [text for _, _, text in sorted(found)]

    def dump(self) -> None:
        """Have every rank of this machine write where it stands to the log."""
        for _, found in self._ranks():
            if found["host"] == socket.gethostname():
                with contextlib.suppress(OSError):
                    os.kill(found["pid"], signal.SIGUSR1)
        time.sleep(DUMP_SECONDS)

    def errors(self) -> list[Json]:
        """What the ranks left about their end, the first one first."""
        paths = sorted(self.folder.glob("*.error.json"), key=lambda path: path.stat().st_mtime_ns)
        return [entry for path in paths if (entry := _read(path)) is not None]

    def silent(self) -> list[int]:
        """The ranks that gave a sign and left no error."""
        return [rank for rank, _ in self._ranks() if not (self.folder / f"{rank}.error.json").exists()]

    def _ranks(self) -> Iterator[tuple[int, Json]]:
        for path in sorted(self.folder.glob("*.json")):
            entry = _read(path) if path.stem.isdigit() else None
            if entry is not None:
                yield int(path.stem), entry


def _handle(pid: int) -> int | None:
    """A file descriptor that becomes readable when a process ends; None where there is none such."""
    try:
        return os.pidfd_open(pid) if sys.platform == "linux" else None
    except OSError:
        return None


def exit_status(pid: int) -> int | None:
    """0 while a process lives or after it ended well; negative for the signal that killed it; None when it is gone.

    Linux keeps the status in /proc until the parent asks for it, which a launcher does once a second, and the
    supervisor of an only rank when it has looked.
    """
    fields = _stat(pid)
    if fields is None:
        return None
    if fields[0] not in ("Z", "X"):
        return 0
    status = int(fields[-1])
    return -(status & 0x7F) if status & 0x7F else status >> 8


def _state(pid: int) -> str:
    """The letter that Linux has for what a process does: R, S, D, T (stopped), Z; empty when it is gone."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def _stat(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on; None when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _read(path: Path) -> Json | None:
    """An entry, None while it is being written."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None
