"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from rlhfdsl.language import files


def test_a_file_keeps_its_mode_and_a_link_stays_one(tmp_path):
    path, link = tmp_path / "a.rlhf", tmp_path / "b.rlhf"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    files.write_whole(link, "new é")
    assert path.read_text(encoding="utf-8") == "new é" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink() and sorted(os.listdir(tmp_path)) == ["a.rlhf", "b.rlhf"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.rhplan"
    path.write_bytes(b"old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_whole(path, b"new")
    assert caught.value.filename == str(path) and path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.rhplan"]


def test_what_is_no_file_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_whole(pipe, "plan")
    assert os.read(reader, 100) == b"plan" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)
