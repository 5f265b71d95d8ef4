"""Which GPUs this process may use."""

from __future__ import annotations

import os


def visible_devices() -> list[str]:
    """CUDA devices as CUDA_VISIBLE_DEVICES names them: those it lists, else their numbers; empty without CUDA."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]
