"""Bar 3: forecasting 2,000 full-batch steps costs 200x less than running them with autograd."""

from typing import Any

import torch
from torch import Tensor, nn

import forgetcast as fc
from benchmarks.machine import floor, interleaved, save, seconds, spread
from forgetcast.forecast.simulate import batches

ROWS, WIDTH, OUTPUTS, STEPS, SLICE = 4000, 512, 50, 2000, 100
DESCENT = {"learning_rate": 10.0, "steps": STEPS}
TRAININGS = {
    "squared loss": fc.GradientDescent(**DESCENT),
    "squared loss, short of convergence": fc.GradientDescent(learning_rate=0.1, steps=STEPS),
    "cross-entropy": fc.GradientDescent(learning_rate=0.1, steps=200, loss="cross_entropy"),
    "cross-entropy, AdamW in minibatches": fc.AdamW(learning_rate=1e-3, steps=STEPS, batch_size=64),
}


def train(phi: Tensor, y: Tensor, training: fc.GradientDescent | fc.AdamW, steps: int) -> nn.Linear:
    """The training itself: autograd and a PyTorch optimiser, float32."""
    module = nn.Linear(WIDTH, OUTPUTS)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    rate = training.learning_rate
    if isinstance(training, fc.AdamW):
        optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=training.weight_decay)
        order = batches(training, len(phi))
    else:
        optimizer, order = torch.optim.SGD(module.parameters(), lr=rate), None
    loss = nn.MSELoss() if training.loss == "squared" else nn.CrossEntropyLoss()
    targets = nn.functional.one_hot(y, OUTPUTS).float() if training.loss == "squared" else y
    for _ in range(steps):
        batch = slice(None) if order is None else next(order)
        optimizer.zero_grad()
        loss(module(phi[batch]), targets[batch]).backward()
        optimizer.step()
    return module


def run() -> dict[str, Any]:
    machine = floor()
    draw = torch.Generator().manual_seed(0)
    phi, old = (torch.randn(rows, WIDTH, generator=draw) for rows in (ROWS, ROWS))
    y = torch.randint(0, OUTPUTS, (ROWS,), generator=draw)
    head = fc.LinearHead.zeros(WIDTH, OUTPUTS)
    result: dict[str, Any] = {
        "setting": {
            "n": ROWS,
            "d": WIDTH,
            "C": OUTPUTS,
            "steps": STEPS,
            "cross_entropy_steps": 200,
            "interleaved_steps": SLICE,
        },
        "machine": machine,
        "bar": {"squared loss": 200.0},
    }
    for name, training in TRAININGS.items():

        def forecast(training: Any = training) -> fc.LinearForecast:
            return fc.forecast_linear(fc.Features(old), fc.Features(phi, y), head, training)

        modules: list[nn.Linear] = []

        def whole(training: Any = training, modules: list[nn.Linear] = modules) -> None:
            modules.append(train(phi, y, training, training.steps))

        contestants = {"forecast": forecast, "training": lambda t=training: train(phi, y, t, SLICE)}
        times = interleaved(contestants, 5 if training.loss == "squared" else 2)
        ratios = [training.steps / SLICE * b / a for a, b in zip(times["forecast"], times["training"], strict=True)]
        full = seconds(whole)
        with torch.no_grad():
            calibration = forecast().compare(modules[0](old))
        result[name] = {
            "steps": training.steps,
            "forecast_seconds": spread(times["forecast"]),
            "training_seconds_all_steps": full,
            "ratio_interleaved": spread(ratios),
            "ratio_all_steps": full / min(times["forecast"]),
            "drift_relative_error": calibration.relative_error,
            "drift_one_minus_cosine": calibration.one_minus_cosine,
        }
    return result


if __name__ == "__main__":
    save("linear_against_training", run())
