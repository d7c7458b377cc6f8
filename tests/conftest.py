"""Options of the whole suite, and what keeps it short."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Models of the tests are so small that threads wait for one another longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ahead  # noqa: E402 (which keeps the environment)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write golden files instead of comparing")


HERE = Path(__file__).parent
RANKS = ("engines", "examples", "running", "training")  # folders of tests that run as a rank or start some


def starts_ranks(item: pytest.Item) -> bool:
    return item.path.relative_to(HERE).parts[0] in RANKS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is quick to fail comes first."""
    items.sort(key=starts_ranks)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build DeepSpeed's operator for the CPU, a minute once for each environment, beside the tests without ranks; and
    begin what other tests wait for."""
    if session.config.option.collectonly:
        return
    wanted = [
        function
        for module in dict.fromkeys(item.module for item in session.items)
        for name, function in getattr(module, "AHEAD", {}).items()
        if any(item.module is module and name in item.fixturenames for item in session.items)
    ]
    for function in wanted:
        ahead.begun(function)
    if any(map(starts_ranks, session.items)):
        subprocess.Popen(
            [sys.executable, "-c", "from rlhfdsl.engines.distributed import build_operator; build_operator()"],
            env=os.environ | {"DS_ACCELERATOR": "cpu"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def settled():
    """DeepSpeed collects garbage whenever it makes an engine: what there is before a module is looked at once."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_linear():
    """An engine at ZeRO 3 leaves a `linear` in torch (engines/gathering.py); each test begins without it."""
    yield
    if "torch" in sys.modules:
        import torch

        torch.nn.functional.linear = torch._C._nn.linear
