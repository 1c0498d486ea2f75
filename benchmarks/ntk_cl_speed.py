"""A training step of NTK-CL as released against the official code: `python -m benchmarks.ntk_cl_speed CHECKOUT`.

CHECKOUT as in `benchmarks.ntk_cl_reference`. All take the same step on the same batch: 16 images of 224 x 224, ten new
classes beside fifty old ones, SGD with momentum and decay, every term of the loss; this project's in float32 and under
autocast to bfloat16 (`training.precision`), for which the official code has no option. Times are taken in turn in one
process; peak memory in a process of its own for each, what importing took aside.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing import get_context
from transformers import ViTConfig, ViTModel

from benchmarks.machine import floor, interleaved, save, spread
from benchmarks.ntk_cl_official import backbone, official, settings
from forgetcast.backbones.huggingface import as_backbone
from forgetcast.learn.attention import PlainAttention
from forgetcast.learn.casts import CastOnce
from forgetcast.methods.base import Batch, TaskData
from forgetcast.methods.ntk_cl import NTKCL

SIZES = {"ViT-Ti/16": (192, 3), "ViT-B/16": (768, 12)}
IMAGES, KNOWN, NEW, ROUNDS, WARM = 16, 50, 10, 5, 2
SGD: dict[str, float] = {"lr": 0.025, "momentum": 0.9, "weight_decay": 5e-4}
SPEED_BAR, MEMORY_BAR = 2.0, 0.6
WHO = ("official", "float32", "bfloat16")
Step = Callable[[], Any]


def batch() -> tuple[Tensor, Tensor]:
    """Images of noise, labels of the new classes."""
    torch.manual_seed(0)
    return torch.rand(IMAGES, 3, 224, 224), KNOWN + torch.arange(IMAGES) % NEW


def official_step(checkout: Path, width: int, heads: int) -> Step:
    """The official training loop over this one batch, its logging left out."""
    modules = official(checkout)
    pixels, labels = batch()
    sizes = {"ffn_num": 16, "d_model": width, "hidden_size": width, "num_prompt_tokens": 10}
    terms = {"nce_temp": 0.03, "dis_temp": 1e-4, "reg_temp": 1e-3}
    arguments = settings(False, **sizes, **terms, init_cls=NEW, increment=NEW, batch_size=IMAGES)
    vit = partial(backbone, modules, depth=12, heads=heads, ratio=4)
    with patch.object(modules.inc_net, "get_backbone", vit):
        net = modules.inc_net.PromptNet(arguments)
    net.fc = None
    net.initialize_fc(KNOWN, KNOWN // NEW - 1)
    torch.nn.init.normal_(net.fc.weight)
    net.initialize_fc(KNOWN + NEW, KNOWN // NEW)
    learner = object.__new__(modules.learner.PromptLearner)
    learner.args, learner._network, learner.weight_decay = arguments, net, SGD["weight_decay"]
    learner._cur_task, learner._known_classes = KNOWN // NEW, KNOWN
    optimizer = learner.get_optimizer(SGD["lr"])
    return lambda: learner._init_train([(None, pixels, labels)], optimizer, None)


def own_step(precision: torch.dtype, width: int, heads: int) -> Step:
    """What the loop of this project does with the recipe `released`."""
    pixels, labels = batch()
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    vit = as_backbone(ViTModel(ViTConfig(**sizes), add_pooling_layer=False), "class_token")
    method = NTKCL(vit, width, recipe="released", contrast=0.03, tasks=10)
    given = Batch(pixels, labels, torch.arange(IMAGES))
    seen = tuple(range(KNOWN + NEW))
    method.begin_task(TaskData(0, seen[:KNOWN], seen[:KNOWN], lambda: iter([given])))
    method.head.sums.normal_()
    method.head.counts.fill_(1)
    method.head.solve()
    method.begin_task(TaskData(5, seen[KNOWN:], seen, lambda: iter([given])))
    method.model.train()
    optimizer = torch.optim.SGD(method.parameter_groups(), **SGD)  # type: ignore[arg-type]

    def step() -> float:
        optimizer.zero_grad()
        half = torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)
        with half, PlainAttention(), CastOnce():
            loss = method.loss(given)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def step_of(who: str, size: str, checkout: Path) -> Step:
    """The step of one contestant."""
    if who == "official":
        return official_step(checkout, *SIZES[size])
    return own_step(getattr(torch, who), *SIZES[size])


def peak(given: tuple[str, str, Path, int]) -> float:
    """MiB at the peak of a few steps, above what the process had before it made the model."""
    who, size, checkout, threads = given
    torch.set_num_threads(threads)
    before = most_resident()
    step = step_of(who, size, checkout)
    for _ in range(WARM):
        step()
    return (most_resident() - before) / 1024


def most_resident() -> int:
    """KiB at this process's peak; of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measured(size: str, checkout: Path, rounds: int) -> dict[str, Any]:
    """Times in turn, memory apart."""
    times = interleaved({who: step_of(who, size, checkout) for who in WHO}, rounds)
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        work = [(who, size, checkout, torch.get_num_threads()) for who in WHO]
        peaks = dict(zip(WHO, pool.map(peak, work, chunksize=1), strict=True))
    found: dict[str, Any] = {"seconds": {who: spread(times[who]) for who in WHO}, "peak_mib": peaks}
    for who in WHO[1:]:
        ratios = [slow / quick for slow, quick in zip(times["official"], times[who], strict=True)]
        found[who] = {
            "times_faster_median": median(ratios),
            "speed_bar": SPEED_BAR,
            "memory_share": peaks[who] / peaks["official"],
            "memory_bar": MEMORY_BAR,
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {size: measured(size, arguments.checkout, arguments.rounds) for size in arguments.sizes}
    print(result)
    save("ntk_cl_speed", {"machine": floor(), "images": IMAGES, **result})
