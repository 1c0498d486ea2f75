"""One run of `forgetcast run`, killed 40 times at random moments and gone on with each time, against one left alone."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.machine import floor, save
from forgetcast.learn.checkpoint import checkpoints
from forgetcast.runs.metrics_log import read_metrics
from forgetcast.runs.record import read_record

RECIPE = Path(__file__).parents[1] / "recipes" / "digits_replay.yaml"
OVERRIDES = ("training.epochs=15", "training.evaluate_every=40", "expected=[]")
EVERY_STEP = "checkpoint.minutes=0.0001"
TASKS, KILLS, SEED = 5, {"starting": 12, "working": 24, "ending": 4}, 0
CHECKPOINTS_A_LIFE = 26  # at most; of 405 steps, 24 lives take about 310
MEASURED_ANEW = ("created", "seconds", "seconds_training", "seconds_evaluation", "peak_memory")


class Life:
    """One process of the command, from its start to its end."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.root = root
        self.errors = root.with_suffix(".errors")
        command = [sys.executable, "-m", "forgetcast", "run", str(RECIPE), "--root", str(root), *OVERRIDES, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.started = time.time()
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)

    @property
    def folder(self) -> Path | None:
        """Of the run; None before it is there."""
        return next(self.root.glob("digits_replay-seed0-*"), None)

    @property
    def newest(self) -> int:
        """Number of the newest checkpoint, 0 before the first."""
        found = [] if self.folder is None else checkpoints(self.folder / "checkpoints")
        return int(found[-1].name) if found else 0

    @property
    def resumed(self) -> bool:
        """Whether this process has begun to log."""
        return self.folder is not None and self._wrote(self.folder / "metrics.jsonl")

    @property
    def through(self) -> bool:
        """Whether it has learnt the last task."""
        return self.resumed and f'"event": "task", "task": {TASKS - 1}' in (self.folder / "metrics.jsonl").read_text()

    @property
    def saving(self) -> bool:
        """Whether it is at a checkpoint just now."""
        return self.folder is not None and any(map(self._wrote, (self.folder / "checkpoints").glob(".part-*")))

    def wait(self, moment: Callable[[], bool]) -> float:
        """Until then; seconds of this life so far."""
        while not moment():
            if self.process.poll() is not None:
                raise RuntimeError(f"the command ended by itself: {self.errors.read_text()[-2000:]}")
            time.sleep(0.001)
        return time.time() - self.started

    def kill(self) -> str | None:
        """SIGKILL, after which nothing can clean up; says what it met, from the disk. None if the end came before."""
        self.process.kill()
        if self.process.wait() != -signal.SIGKILL:
            return None
        if self.saving:
            return "writing a checkpoint"
        return "starting" if not self.resumed else "ending" if self.through else "working"

    def end(self) -> float:
        """Seconds that it took to end by itself."""
        if self.process.wait() != 0:
            raise RuntimeError(self.errors.read_text()[-2000:])
        return time.time() - self.started

    def _wrote(self, path: Path) -> bool:
        try:
            return path.stat().st_mtime >= self.started
        except FileNotFoundError:
            return False


def killed(draw: random.Random, root: Path, aim: str, starting: float, ending: float) -> dict[str, Any]:
    """Kill a process at a random moment of the phase aimed at; what the kill met, and after which checkpoint."""
    met = None
    while met is None:
        life = Life(root, EVERY_STEP)
        if aim == "starting":
            time.sleep(draw.uniform(0, starting))
        elif aim == "working":
            last = life.newest + draw.randrange(CHECKPOINTS_A_LIFE)
            life.wait(lambda life=life, last=last: life.resumed and life.newest >= last)
            time.sleep(draw.uniform(0, 0.1))
        else:
            life.wait(lambda life=life: life.through)
            time.sleep(draw.uniform(0, ending))
        met = life.kill()
    return {"met": met, "after_checkpoint": life.newest}


def left(root: Path) -> dict[str, Any]:
    """All that a run leaves that must not depend on how often it was killed."""
    (folder,) = root.glob("digits_replay-seed0-*")
    record = {key: value for key, value in read_record(folder).items() if key not in MEASURED_ANEW}
    record["recipe"] = {key: value for key, value in record["recipe"].items() if key != "checkpoint"}
    state = (checkpoints(folder / "checkpoints")[-1] / "tensors.safetensors").read_bytes()
    return {
        "weights": record["weights_hash"]["model_at_end"],
        "weights, memory and random state, bit for bit": hashlib.sha256(state).hexdigest(),
        "metrics.jsonl": (folder / "metrics.jsonl").read_text(),
        "record": record,
        "names of files": sorted(path.name for path in folder.iterdir()),
    }


def run() -> dict[str, Any]:
    draw = random.Random(SEED)
    with TemporaryDirectory() as name:
        whole, often = Path(name) / "whole", Path(name) / "often"
        alone = Life(whole)
        starting = alone.wait(lambda: alone.resumed)
        through = alone.wait(lambda: alone.through)
        ending = alone.end() - through
        aims = [aim for aim in ("starting", "working") for _ in range(KILLS[aim])]
        draw.shuffle(aims)
        aims += ["ending"] * KILLS["ending"]
        kills = [killed(draw, often, aim, starting, ending) for aim in aims]
        ends = []
        for _ in range(2):  # the second has nothing left to do
            last = Life(often, EVERY_STEP)
            last.end()
            ends.append(left(often))
        expected = left(whole)
        events = read_metrics(next(often.glob("*/metrics.jsonl")))
        return {
            "setting": {"recipe": RECIPE.name, "overrides": [*OVERRIDES, EVERY_STEP], "seed": SEED, "tasks": TASKS},
            "machine": floor(),
            "kills": len(kills),
            "met": dict(Counter(kill["met"] for kill in kills)),
            "after_checkpoint": [kill["after_checkpoint"] for kill in kills],
            "equal to the run left alone": {
                key: all(end[key] == value for end in ends) for key, value in expected.items()
            },
            "times each task was logged": [
                sum(event["event"] == "task" and event["task"] == task for event in events) for task in range(TASKS)
            ],
            "damaged checkpoints met": last.errors.read_text().count("damaged"),
            "metrics": expected["record"]["metrics"],
        }


if __name__ == "__main__":
    save("forty_kills", run())
