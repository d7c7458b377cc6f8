"""`rlhf bench rollout` on the CPU, with the tiny model that it takes there."""

import json
import subprocess
import sys

import pytest

from rlhfdsl.cli.main import main

SMALL = ["bench", "rollout", "--device", "cpu", "--prompt", "4", "--answer", "2", "--format", "json"]


@pytest.mark.slow
def test_the_table_is_all_that_is_printed_even_where_its_file_cannot_be_written(tmp_path):
    """More at once than the 128 slots in which the answers that end by themselves are sampled."""
    command = [sys.executable, "-m", "rlhfdsl", *SMALL, "--rows", "130", "-o", str(tmp_path / "nowhere" / "table.json")]
    ran = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(ran.stdout)
    assert [row["rows"] for row in found] == [130, 128, 128] and all(row["tokens_per_second"] > 0 for row in found)
    assert ran.returncode == 2 and ran.stderr.endswith("table.json: No such file or directory\n")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rows", "0"], "argument --rows: takes a number from 1, not `0`"),
        (["--prompt", "1000", "--answer", "25"], "1000 and --answer 25 exceed the 1024 positions of the model"),
        (["--model", "nobody/nothing"], "`nobody/nothing` is not in the catalog"),
    ],
)
def test_what_cannot_be_measured_is_said_before(more, said, capsys):
    assert main([*SMALL, *more]) == 2
    assert said in capsys.readouterr().err
