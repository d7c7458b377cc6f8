"""What the tests of engines and of training share: one process that is the only rank, and a small model."""

import pytest
from small import one_rank, scratch


@pytest.fixture(scope="session", autouse=True)
def joined():
    return one_rank()


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> str:
    """A two-layer Llama from scratch on the disk."""
    return scratch(tmp_path_factory.mktemp("model") / "small")
