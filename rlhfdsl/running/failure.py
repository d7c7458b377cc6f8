"""Why a stage ended early: what each rank says of itself, and the one message that is made of it.

Exit codes of `rlhf run` by what happened: EXITS; any other failure is 1.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

from rlhfdsl.engines.checkpoint import store
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.models.exhausted import disk_full, host_out_of_memory, out_of_memory
from rlhfdsl.running.watch import FOLDER, Watch

SHOWN = 4  # ranks that a message names
NO_ROOM = 1 << 20  # bytes that a disk has left which a rank found full
DIED, MEMORY, NOT_FINITE, HANGS, FULL = "E0791", "E0790", "E0794", "E0795", "E0798"
LOGGED = (DIED, "E0742")  # of what happened the log holds more than the message
EXITS = {DIED: 4, MEMORY: 5, NOT_FINITE: 6, HANGS: 7, FULL: 2}

Json = dict[str, Any]

# What torch says on the ranks that were waiting for one that is gone.
_PEER_IS_GONE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket Timeout",
    "ncclRemoteError", "NCCL communicator was aborted", "Timed out waiting", "recvBytes", "Socket closed",
)  # fmt: skip
_ROOM = "make room (`rlhf cache gc` removes what later runs replaced), and run the same command again"
_LESS_MEMORY = "a smaller `micro`, `gradient_checkpointing = on` or a higher `zero` in the engine's `parallel`"


def leave(directory: Path, stage: Json, rank: int, error: Exception, doing: str) -> None:
    """Write what this rank died of to the stage's folder. doing: what it had begun, `actor: backward`."""
    engine = doing.partition(":")[0] if doing.partition(":")[0] in stage["engines"] else None
    found = {"rank": rank, "doing": doing, "peer": False, "code": None, "at": None, "place": None, "help": None}
    if isinstance(error, UserError):
        found |= {"code": error.code, "message": error.message, "place": error.place, "help": error.help}
        found["at"] = engine_address(stage, engine, "lr") if error.code == NOT_FINITE else error.at
    elif out_of_memory(error):
        whose = "host" if host_out_of_memory(error) else "device"
        message = f"the {whose} ran out of memory: {first_line(error)}"
        found |= {"code": MEMORY, "message": message, "help": _LESS_MEMORY}
        found["at"] = engine_address(stage, engine, "parallel")
    elif disk_full(error):
        found |= {"code": FULL, "message": f"a disk is full, at {doing}: {first_line(error)}", "help": _ROOM}
    else:
        found["message"] = f"{type(error).__name__}: {first_line(error)}"
        found["peer"] = any(text in str(error) for text in _PEER_IS_GONE)
    folder = directory / FOLDER
    with contextlib.suppress(OSError):  # of a full disk `explain` finds out by itself
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{rank}.error.json").write_text(json.dumps(found), encoding="utf-8")


def engine_address(stage: Json, engine: str | None, setting: str) -> str:
    """The address in the recipe of a setting of an engine: `stage.ppo.actor.lr`, `stage.sft.lr`."""
    at: str = stage["address"]
    if engine is None:
        return at
    inner = f".{engine}" if stage["kind"] not in ("sft", "reward", "dpo") or engine == "ref" else ""
    return f"{at}{inner}.{setting}"


def explain(stage: Json, partial: Path, watch: Watch, code: int) -> UserError:
    """The one message of a stage that ended with `code`: of the rank that failed, not of those it left.

    code: of what launcher.start returned. A signal is negative, or 256 less it where a launcher hands it on.
    """
    kept = _kept(partial)
    killed = watch.killed()
    if killed is None and -code % 256 in signal.valid_signals():
        # Seen by its parent alone. A launcher does not say which rank it was: the only one that said nothing.
        silent = watch.silent()
        killed = (silent[0] if len(silent) == 1 else -1, -code % 256)
    # A rank that was killed says nothing; the others then fail in their next collective call, each in its own words.
    errors = _errors(watch)
    if errors and (errors[0]["code"] is not None or killed is None):
        return _said(stage, partial, errors[0], kept)
    if killed is None and shutil.disk_usage(partial).free < NO_ROOM:
        return UserError(
            FULL, f"{stage['address']}: the disk of `{partial}` is full", at=stage["address"], help=_ROOM + kept
        )
    help = f"its output is in {partial / 'log.txt'}"
    if killed is None:
        how = f"a rank ended with exit code {code}"
    else:
        rank, number = killed
        how = f"{'a rank' if rank < 0 else f'rank {rank}'} was killed by {_signal(number)}"
        if number == signal.SIGKILL:
            help = "the system does so when memory runs out (`dmesg` tells), and so do schedulers; " + help
    return UserError(DIED, f"{stage['address']}: {how} and left no message", at=stage["address"], help=help + kept)


def left_by(stage: Json, partial: Path) -> UserError | None:
    """What the rank that failed first said of it, of a stage that broke off; None when none could."""
    errors = _errors(Watch(partial, patience=0.0))
    return _said(stage, partial, errors[0], _kept(partial)) if errors else None


def _errors(watch: Watch) -> list[Json]:
    """What ranks died of, first what is not a consequence of another's end."""
    return sorted(watch.errors(), key=lambda entry: (entry["code"] is None, entry["peer"]))


def hangs(stage: Json, partial: Path, watch: Watch) -> UserError:
    """The message of a stage that made no progress."""
    message = f"{stage['address']} made no progress for {watch.patience:g} s"
    stalled = watch.stalled()
    if stalled:
        more = f" and {len(stalled) - SHOWN} more" if len(stalled) > SHOWN else ""
        message += f": {'; '.join(stalled[:SHOWN])}{more}"
    help = f"where each rank stands is at the end of {partial / 'log.txt'}; `--patience` waits longer"
    return UserError(HANGS, message, at=stage["address"], help=help + _kept(partial))


def _said(stage: Json, partial: Path, entry: Json, kept: str) -> UserError:
    if entry["code"] is None:
        message = f"{stage['address']} failed on rank {entry['rank']} at {entry['doing']}: {entry['message']}"
        help = f"the whole output is in {partial / 'log.txt'}"
        return UserError(DIED, message, at=stage["address"], help=help + kept)
    message = entry["message"]
    if entry["code"] in (MEMORY, NOT_FINITE, FULL):
        message = f"{stage['address']}, rank {entry['rank']}: {message}"
    at = entry["at"] or stage["address"]
    return UserError(entry["code"], message, at=at, place=entry["place"], help=(entry["help"] or "") + kept or None)


def _kept(partial: Path) -> str:
    """What a new start goes on from, for the end of a help."""
    for path in store.all_of(partial / store.FOLDER):
        manifest = store.read(path)
        if not isinstance(manifest, str):
            return f"; the checkpoint after {manifest['update']} of {manifest['of']} is kept"
    return ""


def _signal(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
