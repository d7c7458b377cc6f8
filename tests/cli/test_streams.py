"""Where what a command says goes: a reader that is gone, a full disk, a stream that is closed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RECIPE = "recipes/quickstart.rlhf"


def rlhf(*arguments, **streams):
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run([sys.executable, "-m", "rlhfdsl", *arguments], text=True, check=False, **given)


@pytest.mark.parametrize("arguments", [("explain", "E0711"), ("check", RECIPE), ("schema",)])
def test_a_full_disk_is_no_bug_of_the_program(arguments):
    with open("/dev/full", "w") as full:
        done = rlhf(*arguments, stdout=full)
    assert (done.returncode, done.stderr) == (2, "rlhf: cannot write: No space left on device\n")


@pytest.mark.parametrize("arguments", [("explain", "E0711"), ("check", RECIPE), ("fmt", "--diff", RECIPE)])
def test_a_stream_that_is_closed(arguments):
    for stream in (1, 2):
        done = rlhf(*arguments, preexec_fn=lambda stream=stream: os.close(stream))
        assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_is_gone():
    reader, writer = os.pipe()
    os.close(reader)
    done = rlhf("schema", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
