"""The fixture of the planning tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def shop(tmp_path):
    """A folder in which recipes are compiled, with a lock of its own."""
    from workshop import Workshop

    return Workshop(tmp_path)
