"""How the kernels of a decode step follow one another.

On devices of capability 9 a kernel is launched while the last programs of the one before it end (programmatic dependent
launch), and waits only then for its input. A kernel of ours begins with `gdc_wait` where EARLY, before it reads what
another wrote, and says `gdc_launch_dependents` when it has read all that takes long.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def early_launch(device: torch.device) -> dict[str, bool]:
    """The arguments of a kernel's launch that say whether it may start early."""
    early = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": early} | ({"launch_pdl": True} if early else {})
