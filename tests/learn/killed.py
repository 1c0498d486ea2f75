"""Kill a run at random times until it has been killed often enough, and compare what it ends with. Prints JSON.

Children are forked from one process that has everything imported, so a kill costs milliseconds, not seconds. The kill
is `SIGKILL`: nothing in the child can clean up.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from small import OPTIMIZATION, plain, stream

from forgetcast.backbones.weights import weights_hash
from forgetcast.learn.loop import Checkpointing, learn


def run(folder: Path) -> None:
    """The run itself, which writes what it ends with."""
    method = plain()
    events: list[dict] = []
    done = learn(
        method,
        stream(),
        OPTIMIZATION,
        seed=3,
        checkpointing=Checkpointing(folder / "checkpoints", steps=2, minutes=0.001),
        evaluate_every=5,
        log_every=3,
        on_event=lambda event: events.append(dict(event)),
    )
    result = {
        "weights": weights_hash(method.model.state_dict()),
        "accuracy_matrix": done.accuracy_matrix,
        "metrics": done.metrics | done.further_metrics,
        "evaluations": done.evaluations,
        "events": events,
    }
    part = folder / "result.part"
    part.write_text(json.dumps(result))
    part.rename(folder / "result.json")


def child(folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            run(folder)
        except BaseException as error:
            (folder / "error.txt").write_text(repr(error))
        os._exit(0)
    return pid


def main(kills: int, seed: int) -> None:
    draw, done, ends = random.Random(seed), 0, []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "whole").mkdir()
        started = time.monotonic()
        os.waitpid(child(root / "whole"), 0)
        duration = time.monotonic() - started
        truth = json.loads((root / "whole" / "result.json").read_text())
        while done < kills:
            folder = root / f"run{len(ends)}"
            folder.mkdir()
            while not (folder / "result.json").exists():
                pid = child(folder)
                if done < kills:
                    time.sleep(draw.uniform(0, duration / 3))
                    if os.waitpid(pid, os.WNOHANG) == (0, 0):
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                        done += 1
                else:
                    os.waitpid(pid, 0)
                if (folder / "error.txt").exists():
                    raise RuntimeError((folder / "error.txt").read_text())
            ends.append(json.loads((folder / "result.json").read_text()) == truth)
    sys.stdout.write(json.dumps({"kills": done, "runs": len(ends), "same": ends, "seconds_of_a_run": duration}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]))
