"""How alike the tasks of each stream are, at random weights: `python -m benchmarks.magnitude_similarity DATA`.

Adds to benchmarks/results/magnitude.json, and writes docs/magnitude_results.md again. No training is needed: gradients
are compared at the weights before the first task.
"""

from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch.multiprocessing import get_context

from benchmarks.machine import RESULTS
from benchmarks.magnitude_results_page import ORDER, page
from benchmarks.magnitude_streams import SETTINGS, WIDTH, NineBlocks
from benchmarks.magnitude_table import ADAPTIVE, DOCS
from benchmarks.method_runs import Store
from benchmarks.tables import arguments_of
from forgetcast.heads.linear import Linear
from forgetcast.learn.seeding import seed_everything
from forgetcast.methods.base import Batch, Model, TaskData
from forgetcast.protect.magnitude import FITTED_TO, FittedTo, SimilarModulesRest
from forgetcast.streams.stream import Stream

SEEDS = range(5)


def batches(stream: Stream, places: np.ndarray):
    """A task's training samples, in order."""
    for some in np.array_split(places, max(1, len(places) // 64)):
        inputs, labels = torch.from_numpy(stream.source.inputs[some]), torch.from_numpy(stream.outputs[some])
        yield Batch(inputs, labels, torch.from_numpy(some))


def cosine(name: str, rows: FittedTo, seed: int, folder: Path) -> float:
    """Mean over the transitions of a stream."""
    setting = SETTINGS[name]
    stream = setting.made(folder, seed)
    seed_everything(seed)
    model = Model(NineBlocks(setting.channels), Linear(WIDTH))
    rest = SimilarModulesRest(rows=rows, guard=None, samples=ADAPTIVE["samples"])
    seen: set[int] = set()
    for index, task in enumerate(stream.tasks):
        seen |= set(task.classes)
        read = partial(batches, stream, task.train)
        rest.begin_task(model, TaskData(index, task.classes, tuple(sorted(seen)), read))
        model.requires_grad_(True)
    return fmean(one["cosine"] for one in rest.decided() if one["cosine"] is not None)


def work(given: tuple[str, FittedTo, int, Path]) -> tuple[str, FittedTo, int, float]:
    """In a worker."""
    torch.set_num_threads(1)
    return *given[:3], cosine(*given)


if __name__ == "__main__":
    arguments = arguments_of(__doc__, ORDER).parse_args()
    store = Store(RESULTS / "magnitude.json")
    place = store.all.setdefault("similarities", {})
    wanted = [
        (name, rows, seed, arguments.data)
        for rows, seed, name in product(reversed(FITTED_TO), SEEDS, arguments.settings)
        if f"{name} / {rows} / seed {seed}" not in place and not arguments.page
    ]
    with get_context("spawn").Pool(arguments.workers) as pool:
        for name, rows, seed, found in pool.imap_unordered(work, wanted):
            place[f"{name} / {rows} / seed {seed}"] = found
            store.save()
            print(name, rows, seed, round(found, 3), flush=True)
    DOCS.write_text(page(store.all))
