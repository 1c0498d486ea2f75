"""What gradient projection costs in memory: one run of one epoch a task in a process of its own."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.projection_runs import Run, Table, method_of, row_of
from benchmarks.projection_settings import SETTINGS, Cached, stream_of
from forgetcast.learn.cost import peak_memory
from forgetcast.learn.loop import learn
from forgetcast.learn.seeding import seed_everything

CPU = torch.device("cpu")
MEBI = 2**20


def memory(run: Run, cached: Cached, folder: Path) -> Table:
    """Peak resident set of the process in bytes before the first task and at the end; numbers that projection keeps."""
    stream = stream_of(cached, run.setting, run.seed)
    seed_everything(run.seed)
    method = method_of(run, SETTINGS[run.setting], folder)
    before = peak_memory(CPU)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* of their directions free")
        done = learn(method, stream, replace(run.optimization(), epochs=1), seed=run.seed)
    state = method.state_dict()
    kept = done.stored_numbers[-1] - sum(value.numel() for value in state["model"].values())
    return {"before": before, "peak": max(done.peak_memory), "kept": kept}


def memory_rows(result: Mapping[str, Any], tuners: Mapping[str, str]) -> list[list[str]]:
    """Setting, tuner, megabytes at the peak above the start without projection and with it, and what it keeps."""
    rows = []
    for name in result["settings"]:
        for tuner, label in tuners.items():
            pair = [result.get("memory", {}).get(row_of(name, tuner, projection=options)) for options in (None, {})]
            if None in pair:
                continue
            plain, projected = pair
            used = [f"{(found['peak'] - found['before']) / MEBI:.0f}" for found in (plain, projected)]
            rows.append([name, label, *used, f"{4 * projected['kept'] / MEBI:.1f}"])
    return rows
