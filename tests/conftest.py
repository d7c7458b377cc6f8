"""Options of the whole suite, and what keeps it short."""

import gc
import os
import sys

import pytest

# Models of the tests are so small that threads wait for one another longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write golden files instead of comparing")


@pytest.fixture(scope="module", autouse=True)
def settled():
    """DeepSpeed collects garbage whenever it makes an engine: what there is before a module is looked at once."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_linear():
    """DeepSpeed puts a `linear` of its own into torch for the first engine at ZeRO 3 and leaves it there, which makes
    every later forward of the process take twice as long."""
    yield
    if "torch" in sys.modules:
        import torch

        torch.nn.functional.linear = torch._C._nn.linear
