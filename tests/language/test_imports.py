"""What the language and `rlhf check` import: nothing that is heavy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import CORPUS

import rlhfdsl

HEAVY = (
    *("torch", "transformers", "deepspeed", "datasets", "tokenizers", "huggingface_hub"),
    *("jsonschema", "rich", "numpy"),
)


@pytest.mark.parametrize(
    "code",
    [
        "import rlhfdsl.language",
        "import rlhfdsl; rlhfdsl.load",
        f"from rlhfdsl.cli.main import main; main(['check', {str(CORPUS / 'ok' / 'three-stages.rlhf')!r}])",
        f"from rlhfdsl.cli.main import main; main(['check', {str(CORPUS / 'bad' / 'E0204-edges.rlhf')!r}])",
        f"from rlhfdsl.cli.main import main; main(['fmt', '--check', {str(CORPUS / 'ok')!r}])",
        f"from rlhfdsl.cli.main import main; main(['explain', {str(CORPUS / 'ok' / 'layers.rlhf')!r}, 'stage.sft.lr'])",
        "from rlhfdsl.cli.main import main; main(['explain', 'E0301'])",
    ],
    ids=["language", "load", "check", "check-bad", "fmt", "explain", "explain-code"],
)
def test_nothing_heavy_is_imported(code):
    program = f"{code}\nimport sys\nheavy = set({HEAVY!r}) & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_an_installed_package_finds_its_grammar(tmp_path):
    """A wheel holds grammar/ inside the package; a checkout has it beside."""
    package = Path(rlhfdsl.__file__).parent
    for folder in ("language", "cli"):
        shutil.copytree(package / folder, tmp_path / "rlhfdsl" / folder)
    shutil.copy(package / "__init__.py", tmp_path / "rlhfdsl")
    shutil.copy(package / "__main__.py", tmp_path / "rlhfdsl")
    shutil.copytree(package.parent / "grammar", tmp_path / "rlhfdsl" / "grammar")
    command = [sys.executable, "-m", "rlhfdsl", "check", str(CORPUS / "ok" / "three-stages.rlhf")]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("ok")
