"""One process, one rank, for all engine tests."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def one_rank():
    from deepspeed.utils import logger

    from rlhfdsl.engines import distributed

    logger.setLevel(logging.WARNING)
    return distributed.join("cpu")


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> str:
    """A two-layer Llama from scratch on the disk."""
    from small import scratch

    return scratch(tmp_path_factory.mktemp("model") / "small")
