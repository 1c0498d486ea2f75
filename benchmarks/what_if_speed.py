"""Bar 5: what-ifs of 300 AdamW steps of a network with 104,000 trainable parameters, from what a forecast has kept."""

from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

import forgetcast as fc
from benchmarks.machine import floor, save, spread

WIDTH, HIDDEN, FEATURES, CLASSES = 128, 256, 256, 20
STEPS, BATCH, RATE, ROUNDS = 300, 64, 1e-3, 5
BAR = 1.0


def setting() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A perceptron, 500 samples of its first ten classes and 2,000 of the other ten."""
    torch.manual_seed(0)
    body = [nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, FEATURES), nn.GELU()]
    model = nn.Sequential(*body, nn.Linear(FEATURES, CLASSES))
    centres = 0.5 * torch.randn(CLASSES, WIDTH)

    def drawn(first: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = first + torch.arange(n) % (CLASSES // 2)
        return centres[labels] + torch.randn(n, WIDTH), labels

    return model, drawn(0, 500), drawn(CLASSES // 2, 2000)


def taken(threads: int, work: Any) -> dict[str, dict[str, float]]:
    """Wall-clock and processor seconds with so many threads; the second do not count what else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        work()
        times = []
        for _ in range(ROUNDS):
            wall, busy = perf_counter(), process_time()
            work()
            times.append((perf_counter() - wall, process_time() - busy))
    finally:
        torch.set_num_threads(before)
    walls, busy_times = zip(*times, strict=True)
    return {"wall_seconds": spread(list(walls)), "processor_seconds": spread(list(busy_times))}


def run() -> dict[str, Any]:
    model, old, new = setting()
    training = fc.AdamW(learning_rate=RATE, steps=STEPS, batch_size=BATCH)
    started = perf_counter()
    forecast = fc.forecast(model, old, new, training, estimator="anchored")
    made = perf_counter() - started
    changed = forecast.what_if(learning_rate=RATE / 2)
    anew = fc.forecast(model, old, new, fc.AdamW(RATE / 2, STEPS, batch_size=BATCH), estimator="anchored")
    same = forecast.what_if().drift
    difference, cosine = (same - forecast.drift).norm() / forecast.drift.norm(), _cosine(changed.drift, anew.drift)
    result: dict[str, Any] = {
        "machine": floor(),
        "setting": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": STEPS,
            "batch_size": BATCH,
            "anchors": len(forecast._surrogates),
            "anchor_samples": sum(len(near) for near in forecast._surrogates),
        },
        "forecast_seconds": made,
        "what_if": {threads: taken(threads, lambda: forecast.what_if(learning_rate=RATE / 2)) for threads in (1, 2)},
        "safe": {1: taken(1, lambda: forecast.safe(max_drop=0.02))},
        "relative_difference_of_what_if_without_a_change": difference.item(),
        "cosine_to_a_forecast_made_anew_at_half_the_rate": cosine,
        "bar_seconds": BAR,
    }
    return result


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


if __name__ == "__main__":
    save("what_if_speed", run())
