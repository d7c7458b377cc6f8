"""What the language and `rlhf check` import: nothing that is heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest
from corpus import CORPUS

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
    ],
    ids=["language", "load", "check", "check-bad"],
)
def test_nothing_heavy_is_imported(code):
    program = f"{code}\nimport sys\nheavy = set({HEAVY!r}) & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
