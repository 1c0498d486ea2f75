"""A recipe run by two processes: one of them writes, and what it writes is what a single process would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forgetcast.runs.execute import execute
from forgetcast.runs.metrics_log import read_metrics
from forgetcast.runs.recipe import load_recipe
from forgetcast.runs.record import read_record

HERE = Path(__file__).parent
RECIPE = """
data: {source: digits, increment: 4}
model: {backbone: mlp:8}
method: {name: replay, capacity: 20}
training: {epochs: 2, learning_rate: 0.01, evaluate_every: 7}
expected: [{metric: last_accuracy, value: 5, tolerance: 0, source: none}]
"""


def launch(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=240)


def test_only_the_main_process_writes_and_all_of_them_end_alike(tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE)
    done = launch(HERE / "two_processes_command.py", "run", recipe, "--root", tmp_path / "two", "--seeds", "0,1")
    assert "exitcode  : 3 " in done.stderr, done.stderr  # the expected number does not hold
    for seed in (0, 1):
        (folder,) = (tmp_path / "two").glob(f"small-seed{seed}-*")
        alone = execute(load_recipe(recipe, [f"seed={seed}"]), tmp_path / "one")
        assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()} | {"report.html"}
        two, one = read_record(folder), read_record(alone)
        assert two["accuracy_matrix"] == one["accuracy_matrix"]
        assert two["split_hash"] == one["split_hash"]
        events, expected = (read_metrics(place / "metrics.jsonl") for place in (folder, alone))
        for key in ("event", "task", "run_step", "accuracy"):
            assert [event.get(key) for event in events] == [event.get(key) for event in expected]
        assert [event.get("loss", 0) for event in events] == pytest.approx(
            [event.get("loss", 0) for event in expected], abs=1e-6
        )
        assert done.stdout.count(f"run: {folder}\n") == 1
    assert done.stdout.count("report: ") == done.stdout.count("last_accuracy") == 2
