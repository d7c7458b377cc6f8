"""A small pipeline in a folder of its own."""

from pathlib import Path

import pytest
from pipeline import write_recipe


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with a three-stage recipe and its data; the working directory of the test."""
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
