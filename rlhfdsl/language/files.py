"""Writing a file that others read: whole, or as it was before."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, data: bytes | str) -> None:
    """A file's new contents, by a rename, so that neither a full disk nor a reader meets half of them.

    A file keeps its mode, a link stays a link, and what is no file (`/dev/stdout`) is written to. Raises OSError that
    names `path`.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = path.resolve()
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                scratch.chmod(target.stat().st_mode & 0o7777)
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def readable(folder: Path) -> None:
    """Give the files of a folder the mode that its own has, which the umask left: safetensors makes its files readable
    by their owner alone, and a run's folder is shared."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(mode)
