"""`determinism = strict` reaches every rank."""

import torch
from pipeline import RECIPE, plan, write_recipe

from rlhfdsl.planning.keys import keys
from rlhfdsl.running import strict


def test_strict_forbids_what_depends_on_timing(tmp_path):
    path = write_recipe(tmp_path)
    normal = plan(path)
    path.write_text(RECIPE.replace("seed     = 3", "seed     = 3, determinism = strict"))
    made = plan(path)
    assert strict.environment(normal) == {} and strict.environment(made)["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert keys(made) == keys(normal)  # the same learning: a result stays
    try:
        strict.enforce(normal)
        assert not torch.are_deterministic_algorithms_enabled()
        strict.enforce(made)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
