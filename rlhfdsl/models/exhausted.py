"""Memory or a disk that ran out, told from every other error."""

from __future__ import annotations

import errno

# How torch words a failed allocation on the CPU, which it raises as a plain RuntimeError.
_ON_THE_HOST = ("can't allocate memory", "not enough memory")
# How the system words it, which safetensors and torch pass on in errors of their own.
_ON_A_DISK = ("No space left on device", "Disk quota exceeded")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or the host ran out."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or host_out_of_memory(error)


def host_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host ran out, which is also that of a run on the CPU."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(text in str(error) for text in _ON_THE_HOST)


def disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room."""
    return any(text in str(error) for text in _ON_A_DISK)
