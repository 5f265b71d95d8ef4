"""Keeping the process' memory flat while large buffers come and go.

glibc raises its threshold for mapping memory directly to the size of the last large block that was freed, and
from then on keeps such blocks in per-thread heaps, where they fragment. Scanning an index 20 times larger, in
chunks of 16 MiB, the peak grew from 443 to 581 MiB; with a fixed threshold, where every large buffer is given
back at once, from 414 to 442 (`python -m tests.benchmarks.memory`, 2 cores). Arrow's own allocator keeps what was
freed, too: ingesting blocks of 32 MiB, the peak was 290 MiB with it and 204 with glibc's.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_THRESHOLD = 4 * 2**20


@lru_cache(1)
def steady_heap() -> bool:
    """Fix the threshold for this process, and let Arrow use the same heap.

    Returns whether the C library has a threshold (glibc); harmless elsewhere.
    """
    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
    except (AttributeError, OSError):
        return False
