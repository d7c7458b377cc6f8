"""Checkpoints on the disk: each a folder that appears at once, with a manifest of what every file in it must be.

    checkpoints/00000120/manifest.json    what it is of, and each file's size and sha256
    checkpoints/00000120/actor/…          files of DeepSpeed
    checkpoints/00000120/rank-0.pt        everything else that rank 0 needs
    checkpoints/.00000180.partial/        being written, or what a killed process left: never read

DeepSpeed loads its files as pickles, so nothing is loaded but what a manifest of this program lists, with the bytes
that it lists. Nothing here needs torch: a plan tells from the same folders where a run would go on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhfdsl.language.diagnostics import first_line

FOLDER = "checkpoints"  # in a stage's folder
MANIFEST = "manifest.json"
STOP = "stop"  # a file in a stage's folder that asks it to save after the update that is running, and to end
FORMAT_VERSION = "1.0"
CHUNK = 1 << 22  # bytes read at a time
READERS = 8  # files hashed at a time

Json = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint: its size in bytes and its sha256 in hexadecimal."""

    bytes: int
    sha256: str


class Files:
    """The files that one process writes into a checkpoint, hashed as they are written.

    What goes wrong is kept in `problem` and not raised: the other ranks are in the same collective calls, and a rank
    that left them would hang the rest. The checkpoint is dropped when all have come to its end.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.problem: str | None = None

    def make(self, folder: Path) -> None:
        """Make a folder of the checkpoint."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._failed(error)

    def write(self, path: Path, fill: Callable[[IO[bytes]], object]) -> None:
        """Write a file with `fill` and force it to the disk. Does nothing once there was a problem."""
        if self.problem is not None:
            return
        hashed: _Hashed | None = None
        try:
            with ThreadPoolExecutor(1) as beside, path.open("wb") as file:
                hashed = _Hashed(file, beside)
                fill(hashed)  # type: ignore[arg-type]  # torch.save asks for `write` and `flush` alone
                file.flush()
                os.fsync(file.fileno())
                # A file system may take fewer bytes than it was given, and say so to nobody.
                if os.fstat(file.fileno()).st_size != hashed.bytes:
                    raise OSError(f"{path.name} is shorter than what was written to it")
        except (OSError, RuntimeError) as error:
            # torch's writer has its own words for what the file raised.
            self._failed((hashed and hashed.error) or error)
            return
        self.entries[path.relative_to(self.folder).as_posix()] = Entry(hashed.bytes, hashed.sha256.hexdigest())

    def adopt(self, path: Path) -> None:
        """List a file that something else wrote into the checkpoint, and force it to the disk."""
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            self._failed(error)
            return
        self.entries[path.relative_to(self.folder).as_posix()] = Entry(size, digest)

    def _failed(self, error: Exception) -> None:
        text = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        self.problem = self.problem or text


class _Hashed:
    """A file that only takes bytes, and knows what it took."""

    def __init__(self, file: IO[bytes], beside: Executor):
        self.file = file
        self.beside = beside  # where large pieces are hashed while they are written
        self.bytes = 0
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Take all of `data`."""
        hashing = self.beside.submit(self.sha256.update, data) if len(data) >= CHUNK else None
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        finally:
            if hashing is not None:
                hashing.result()  # `data` is torch's own memory, and only until this returns
        if hashing is None:
            self.sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """As a file's."""
        self.file.flush()


def begin(root: Path, update: int) -> Path:
    """The folder to write the checkpoint of `update` into. It is not made."""
    return root / f".{update:08d}.partial"


def commit(partial: Path, manifest: Json, entries: Mapping[str, Entry]) -> Path:
    """Give a written checkpoint its manifest and its name, all of it on the disk. Raises OSError."""
    listed = {name: {"bytes": e.bytes, "sha256": e.sha256} for name, e in sorted(entries.items())}
    content = {"format_version": FORMAT_VERSION, "made": round(time.time(), 3), **manifest, "files": listed}
    content["digest"] = _digest(content)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with (partial / MANIFEST).open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    for folder in (*(path for path in sorted(partial.rglob("*")) if path.is_dir()), partial):
        _sync(folder)
    final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    if final.exists():  # one that was found broken, and is made anew
        shutil.rmtree(final)
    os.rename(partial, final)
    _sync(final.parent)
    return final


def prune(root: Path, keep: int) -> None:
    """Leave the newest `keep` checkpoints, and nothing of those that were not finished."""
    for path in _unfinished(root):
        shutil.rmtree(path, ignore_errors=True)
    for path in all_of(root)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


def all_of(root: Path) -> list[Path]:
    """The checkpoints under `root`, newest first, whole or not."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.name.isdigit() and p.is_dir()), reverse=True)


def read(path: Path) -> Json | str:
    """The manifest of a checkpoint, or what is wrong with it. Looks at names and sizes, not at contents."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name} has no {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"{path.name}/{MANIFEST} cannot be read: {error}"
    if not isinstance(manifest, dict) or manifest.get("digest") != _digest(manifest):
        return f"{path.name}/{MANIFEST} is damaged"
    if str(manifest["format_version"]).split(".")[0] != FORMAT_VERSION.split(".")[0]:
        return f"{path.name} is of format {manifest['format_version']}, and this version reads {FORMAT_VERSION}"
    for name, entry in manifest["files"].items():
        if name.startswith("/") or ".." in Path(name).parts:
            return f"{path.name} names `{name}`, which is outside of it"
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{path.name}/{name} is missing"
        if size != entry["bytes"]:
            return f"{path.name}/{name} has {size} bytes in place of {entry['bytes']}"
    return manifest


def damage(path: Path, manifest: Json) -> str | None:
    """What is wrong with the contents of a checkpoint's files, by their sha256; None when nothing is."""
    names = list(manifest["files"])
    with ThreadPoolExecutor(READERS) as pool:
        for name, found in zip(names, pool.map(lambda name: sha256_of(path / name), names), strict=True):
            if found != manifest["files"][name]["sha256"]:
                return f"{path.name}/{name} is not what was written"
    return None


def sha256_of(path: Path) -> str | None:
    """The sha256 of a file in hexadecimal, None when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def _unfinished(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (path for path in root.iterdir() if path.name.startswith(".") and path.name.endswith(".partial"))


def _digest(manifest: Mapping[str, Any]) -> str:
    """A hash over a manifest apart from this hash itself."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Force a folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
