"""Options of the whole suite, and what keeps it short."""

import gc
import os

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
