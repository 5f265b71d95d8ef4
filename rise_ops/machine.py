"""The machine that something was measured on: its devices by name, the memory of this process and of theirs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def device_name(device: torch.device) -> str:
    """What a GPU is called; the kind of any other device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def measured_on(device: str) -> dict[str, Any]:
    """What goes with a measurement: {machine: {device, threads}, measured: the time in UTC}."""
    import torch

    machine = {"device": device, "threads": torch.get_num_threads()}
    return {"machine": machine, "measured": datetime.now(UTC).isoformat(timespec="seconds")}


def memory_now() -> int | None:
    """Bytes that this process has resident, or on the GPU allocated where there is one; None: not known here."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else resident("VmRSS")


def memory_peak() -> int | None:
    """The same at its highest."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else resident("VmHWM")


def resident(name: str) -> int | None:
    """A figure of /proc/self/status in bytes: VmRSS, or VmHWM, its peak; None where there is none."""
    return _kilobytes("/proc/self/status", name)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _kilobytes(file: str, name: str) -> int | None:
    try:
        lines = Path(file).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1_024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
