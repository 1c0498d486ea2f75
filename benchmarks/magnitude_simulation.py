"""Bar: closed forms of update magnitude and of step lengths against simulations, 20,000 draws each, float64, one core.

    python -m benchmarks.magnitude_simulation [--page]

writes benchmarks/results/magnitude_simulation.json and docs/magnitude_simulation.md; with --page the page alone, from
the numbers that are there.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from math import sqrt
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from benchmarks.machine import RESULTS, floor, save
from benchmarks.magnitude_page import page
from benchmarks.magnitude_rows import DRAWS, SEED, crossings, optimum, sequences, transitions
from benchmarks.magnitude_step_rows import step_lengths

BARS = {transitions: 0.02, optimum: 0.02, crossings: 0.03, sequences: 0.02, step_lengths: 0.02}
"""Largest relative error."""
NAME = "magnitude_simulation"
DOCS = Path(__file__).parents[1] / "docs" / f"{NAME}.md"


def run() -> dict[str, Any]:
    """All rows and their summary, on one thread."""
    threads, began = torch.get_num_threads(), process_time()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            machine = floor()
            parts = {part.__name__: [row.entry(bar) for row in part()] for part, bar in BARS.items()}
    finally:
        torch.set_num_threads(threads)
    summary = {part.__name__: summarised(parts[part.__name__], bar) for part, bar in BARS.items()}
    known = {"draws": DRAWS, "seed": SEED, "machine": machine, "cpu_seconds": process_time() - began}
    return {**known, "summary": summary, "rows": parts}


def summarised(rows: list[dict[str, Any]], bar: float) -> dict[str, Any]:
    """How many rows hold, the worst of them, the root mean square of difference / standard error."""
    drawn = [row for row in rows if row["standard_error"]]
    scores = [(row["simulated"] - row["closed"]) / row["standard_error"] for row in drawn]
    return {
        "bar": bar,
        "rows": len(rows),
        "within_bar": sum(row["holds"] == "bar" for row in rows),
        "within_noise": sum(row["holds"] == "noise" for row in rows),
        "worst_relative_error": max(row["relative_error"] for row in rows),
        "largest_relative_standard_error": max(row["standard_error"] / abs(row["closed"]) for row in rows),
        "differences_in_standard_errors": sqrt(fmean(score**2 for score in scores)),
    }


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="simulate nothing, write the page from what is there")
    if not parser.parse_args().page:
        save(NAME, run())
    DOCS.write_text(page(json.loads((RESULTS / f"{NAME}.json").read_text())))
