"""What a method costs: numbers that train, numbers that it keeps, memory."""

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetcast.methods.base import Method


def trainable_parameters(method: Method) -> int:
    """Numbers that gradient steps move; 0 for a closed form."""
    return sum(p.numel() for p in method.model.parameters() if p.requires_grad) if method.by_gradient else 0


def stored_numbers(state: Any) -> int:
    """Numbers in all tensors of a state."""
    if isinstance(state, Tensor):
        return state.numel()
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return sum(stored_numbers(value) for value in values)


def peak_memory_definition(device: torch.device) -> str:
    """The name of what `peak_memory` measures for a device."""
    return "cuda_max_memory_allocated" if device.type == "cuda" else "peak_resident_set_size"


def start_peak_memory(device: torch.device) -> None:
    """Begin a new peak on a GPU; that of main memory is the process's own and cannot be begun anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: in tensors on a GPU since `start_peak_memory`, or else of the process since it started."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage also counts what the process was before its program was loaded
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes
