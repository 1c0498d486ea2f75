"""What the machine can do at best, and how times are taken: all contestants in turn, round after round."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    started = perf_counter()
    work()
    return perf_counter() - started


def interleaved(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times of every contestant in every round, after one warm-up, so that noise meets all alike."""
    for work in contestants.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            times[name].append(seconds(work))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Least and median of several measurements."""
    return {"min": min(values), "median": median(values)}


def floor() -> dict[str, Any]:
    """Float32 GEMM rate, a float64 eigh of 769 x 769, and what they ran on."""
    left = torch.randn(2048, 2048)
    symmetric = torch.randn(769, 769, dtype=torch.float64)
    symmetric = symmetric @ symmetric.T
    times = interleaved({"gemm": lambda: left @ left, "eigh": lambda: torch.linalg.eigh(symmetric)}, 5)
    return {
        "gemm_gflops": 2 * 2048**3 / min(times["gemm"]) / 1e9,
        "eigh_769_seconds": min(times["eigh"]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
