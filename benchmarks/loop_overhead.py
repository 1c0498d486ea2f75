"""The learning loop's own time on a small ViT: against the same steps written out by hand, in the same run."""

from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTModel

from benchmarks.machine import floor, interleaved, save, spread
from forgetcast.backbones.huggingface import as_backbone
from forgetcast.heads.linear import Linear
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.learn.seeding import epoch_order
from forgetcast.methods.base import Model
from forgetcast.methods.sequential import Sequential
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source

ROWS, BATCH = 640, 32
SHAPE = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 384}


def model() -> Model:
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**SHAPE, image_size=32, patch_size=4), add_pooling_layer=False)
    backbone = as_backbone(vit).requires_grad_(True)
    return Model(backbone, Linear(96, 2))


def run() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(ROWS + 20, 3, 32, 32)).astype(np.float32)
    labels = np.arange(ROWS + 20) % 2
    source = Source("noise", inputs, labels, test=np.arange(ROWS, ROWS + 20))
    stream = class_incremental(source, 2, class_order=[0, 1])
    optimization = Optimization(learning_rate=1e-4, batch_size=BATCH)
    train = torch.from_numpy(stream[0].train)
    losses: dict[str, float] = {}

    def loop() -> None:
        done = learn(Sequential(model()), stream, optimization)
        losses["loop"] = done.events[0]["loss"]

    def by_hand() -> None:
        network = model().train()
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
        images, answers, order = torch.from_numpy(inputs), torch.from_numpy(labels), epoch_order(ROWS, 0, 0, 0)
        total = 0.0
        for places in torch.split(train[order], BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(network(images[places]), answers[places])
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        losses["by hand"] = total / (ROWS // BATCH)
        network.eval()
        with torch.no_grad():
            network(images[stream[0].test])

    times = interleaved({"loop": loop, "by hand": by_hand}, 7)
    ratios = [ours / theirs for ours, theirs in zip(times["loop"], times["by hand"], strict=True)]
    return {
        "setting": {"rows": ROWS, "batch_size": BATCH, **SHAPE, "image": 32, "patch": 4},
        "machine": floor(),
        "seconds": {name: spread(values) for name, values in times.items()},
        "overhead": {"median": median(ratios) - 1, "of_minima": min(times["loop"]) / min(times["by hand"]) - 1},
        "bar": 0.05,
        "mean_loss": losses,
    }


if __name__ == "__main__":
    save("loop_overhead", run())
