"""Bar 6: tangent kernels against other libraries, each in a process of its own, in turn, checked against float64.

    python -m benchmarks.kernel_race

Contenders that are not installed are left out, with the reason, and the others race. RACE_PYTHON names the interpreter
of an environment that has them; installing them into the project's own would bring torchvision. How to make one:
docs/benchmarks.md, "Kernel assembly".
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

ROUNDS, TOLERANCE = 5, 1e-5
CONTENDERS = ["forgetcast", "torch.func", "TorchJD", "nngeometry", "curvlinops"]
JOBS = {
    "B1": {"model": "MLP 256-512-512-10, all parameters", "n": 96, "c": 10},
    "B2": {"model": "ViT d=192, 4 blocks, T=65, LoRA r=8 on q and v", "n": 48, "c": 10},
    "CNN": {"model": "3 convolutions 3x3 (16, 32, 64 channels) on 32 x 32 pixels, all parameters", "n": 32, "c": 10},
}
CHECKED = 24
"""Samples whose block of the kernel is compared with float64."""

SETUP = "docs/benchmarks.md says how to set the rivals up; then give RACE_PYTHON that environment's interpreter"

COLUMNS = {"B1": None, "B2": 24, "CNN": None}
"""Columns of the kernel that curvlinops computes; its time is that share of the whole."""


def task(job: str) -> tuple[Any, Any]:
    """The model and its inputs, the same in every process; only what trains requires gradients."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if job == "B1":
        model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        return model, torch.randn(96, 256)
    if job == "CNN":
        return convolutions(), torch.randn(32, 3, 32, 32)
    model = vision_transformer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    return model, torch.randn(48, 3, 32, 32)


def convolutions() -> Any:
    from torch import nn

    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vision_transformer() -> Any:
    import torch
    from torch import Tensor, nn

    class LowRank(nn.Module):
        def __init__(self, width: int, rank: int) -> None:
            super().__init__()
            self.frozen = nn.Linear(width, width)
            self.lora_A = nn.Linear(width, rank, bias=False)
            self.lora_B = nn.Linear(rank, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(x) + self.lora_B(self.lora_A(x))

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.k, self.v = LowRank(width, 8), nn.Linear(width, width), LowRank(width, 8)
            self.out = nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            q, k, v = (part(h).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in (self.q, self.k, self.v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.out(mixed.transpose(-3, -2).flatten(-2))
            return x + self.mlp(self.second(x))

    class Transformer(nn.Module):
        def __init__(self, width: int = 192) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, 4, 4)
            self.token = nn.Parameter(torch.randn(1, 1, width))
            self.place = nn.Parameter(torch.randn(1, 65, width))
            self.blocks = nn.Sequential(*(Block(width, 3) for _ in range(4)))
            self.head = nn.Linear(width, 10)

        def forward(self, images: Tensor) -> Tensor:
            x = self.patches(images).flatten(2).mT
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
            return self.head(self.blocks(x)[:, 0])

    return Transformer()


def forgetcast(model: Any, x: Any, _: str) -> Callable[[], Any]:
    from forgetcast.tangent.jacobian import trainable
    from forgetcast.tangent.kernel import tangent_kernel

    parameters = trainable(model)
    return lambda: tangent_kernel(model, x, parameters=parameters).aa


def torch_func(model: Any, x: Any, _: str) -> Callable[[], Any]:
    """Per-sample `jacrev` under `vmap`, the quickest of several chunks."""
    from torch.func import functional_call, jacrev, vmap

    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def one(values: Any, sample: Any) -> Any:
        return functional_call(model, values, (sample[None],))[0]

    def kernel(chunk: int) -> Any:
        J = vmap(jacrev(one), (None, 0), chunk_size=chunk)(parameters, x)
        rows = [part.flatten(2).flatten(0, 1) for part in J.values()]
        return sum(part @ part.T for part in rows).view(len(x), -1, len(x), rows[0].shape[0] // len(x))

    times = {}
    for chunk in (8, 16, len(x)):
        started = perf_counter()
        kernel(chunk)
        times[chunk] = perf_counter() - started
    best = min(times, key=lambda chunk: times[chunk])
    return lambda: kernel(best)


def torchjd(model: Any, x: Any, _: str) -> Callable[[], Any]:
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)
    return lambda: engine.compute_gramian(model(x)).view(len(x), 10, len(x), 10)


def nngeometry(model: Any, x: Any, _: str) -> Callable[[], Any]:
    """One batch of all samples."""
    import torch
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection
    from torch.utils.data import DataLoader, TensorDataset

    layers = LayerCollection()
    for name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            layers.add_layer(name, LayerCollection._module_to_layer(module))
    loader = DataLoader(TensorDataset(x.clone(), torch.zeros(len(x))), batch_size=len(x))

    def kernel() -> Any:
        found = GramMatrix(model, loader, function=lambda *d: model(d[0]), layer_collection=layers)
        return found.to_torch().permute(1, 0, 3, 2)

    return kernel


def curvlinops(model: Any, x: Any, job: str) -> Callable[[], Any]:
    """Rows of J from `J^T I`, in blocks of 24 columns, then one product with what is there."""
    import torch
    from curvlinops import TransposedJacobianLinearOperator
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = [p for p in model.parameters() if p.requires_grad]
    data = [(x, torch.zeros(len(x), 10))]
    operator = TransposedJacobianLinearOperator(model, parameters, data, check_deterministic=False)
    identity = torch.eye(len(x) * 10)[:, : COLUMNS[job]]

    def kernel() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            rows = torch.cat([operator @ part for part in identity.split(24, 1)], 1)
        return (rows.T @ rows).view(-1, 10, rows.shape[1] // 10, 10) if COLUMNS[job] is None else rows.T @ rows

    return kernel


def forward(model: Any, x: Any, _: str) -> Callable[[], Any]:
    """One forward pass of all samples, the unit of the floor."""
    import torch

    def work() -> Any:
        with torch.no_grad():
            return model(x)

    return work


def oracle(job: str) -> Any:
    """The kernel of the first samples in float64 by `torch.func`, one parameter at a time."""
    from torch.func import functional_call, jacrev, vmap

    model, x = task(job)
    model, x = model.double(), x[:CHECKED].double()
    kernel: Any = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            one = jacrev(lambda value, sample, name=name: functional_call(model, {name: value}, (sample[None],))[0])
            rows = vmap(one, (None, 0), chunk_size=8)(parameter.detach(), x).flatten(2).flatten(0, 1)
            kernel = kernel + rows @ rows.T
    return kernel.view(len(x), 10, len(x), 10)


WORKS = {
    "forgetcast": forgetcast,
    "torch.func": torch_func,
    "TorchJD": torchjd,
    "nngeometry": nngeometry,
    "curvlinops": curvlinops,
    "forward": forward,
}


def worker(contender: str, job: str, folder: str) -> None:
    """Warm up, keep the result, then take one time for every line of input."""
    import torch

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    if contender == "oracle":
        torch.save(oracle(job), Path(folder) / f"{job}.oracle.pt")
        print(json.dumps({"ready": True}), flush=True)
        return
    model, x = task(job)
    before = peak()
    try:
        started = perf_counter()
        work = WORKS[contender](model, x, job)
        torch.save(work().detach(), Path(folder) / f"{job}.{contender}.pt")
    except ModuleNotFoundError as problem:
        print(json.dumps({"ready": False, "reason": f"not installed: {problem.name}"}), flush=True)
        return
    except Exception as problem:
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:160]
        print(json.dumps({"ready": False, "reason": reason}), flush=True)
        return
    first = perf_counter() - started
    print(json.dumps({"ready": True, "first_seconds": first}), flush=True)
    for _ in sys.stdin:
        wall, busy = perf_counter(), process_time()
        work()
        answer = {"wall": perf_counter() - wall, "cpu": process_time() - busy, "peak_mb": (peak() - before) / 1e6}
        print(json.dumps(answer), flush=True)


class Contestant:
    """A worker process that is asked for one time after another."""

    def __init__(self, contender: str, job: str, folder: str, threads: int) -> None:
        # threads are set before anything is imported: later, numpy's and torch's libraries disagree
        counts = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
        command = [os.environ.get("RACE_PYTHON", sys.executable), "-W", "ignore", "-m", "benchmarks.kernel_race"]
        self.process = subprocess.Popen(
            [*command, contender, job, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **counts},
        )
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        self.state = json.loads(line) if line else {"ready": False, "reason": "the process died (memory?)"}

    def time(self) -> dict[str, float]:
        self.process.stdin.write("go\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return json.loads(self.process.stdout.readline())  # type: ignore[union-attr]

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def error(job: str, contender: str, folder: str) -> float:
    import torch

    truth, found = (torch.load(Path(folder) / f"{job}.{name}.pt").detach() for name in ("oracle", contender))
    if contender == "curvlinops" and COLUMNS[job] is not None:
        truth = truth.flatten(0, 1).flatten(1)[: COLUMNS[job], : COLUMNS[job]]
    else:
        found = found[:CHECKED, :, :CHECKED]
    return ((found.double() - truth).norm() / truth.norm()).item()


def race(job: str, folder: str, threads: int) -> dict[str, Any]:
    Contestant("oracle", job, folder, threads).close()
    result: dict[str, Any] = {"setting": JOBS[job], "contenders": {}}
    racing: dict[str, Contestant] = {}
    for name in ["forward", *CONTENDERS]:
        contestant = Contestant(name, job, folder, threads)
        entry = result["contenders"][name] = dict(contestant.state)
        if contestant.state["ready"] and name != "forward":
            entry["relative_error"] = error(job, name, folder)
            if not entry["relative_error"] <= TOLERANCE:
                entry["reason"] = f"wrong: relative error {entry['relative_error']:.2g}, so no time"
        if "reason" in entry:
            contestant.close()
        else:
            racing[name] = contestant
    times: dict[str, list[dict[str, float]]] = {name: [] for name in racing}
    for _ in range(ROUNDS):
        for name, contestant in racing.items():
            times[name].append(contestant.time())
    for name, contestant in racing.items():
        contestant.close()
        share = 1.0
        if name == "curvlinops" and COLUMNS[job] is not None:
            share = COLUMNS[job] / (JOBS[job]["n"] * JOBS[job]["c"])
            result["contenders"][name]["measured_share"] = share
        for kind in ("wall", "cpu"):
            values = [one[kind] / share for one in times[name]]
            result["contenders"][name][f"{kind}_seconds"] = {"min": min(values), "median": median(values)}
        result["contenders"][name]["peak_mb_above_start"] = max(one["peak_mb"] for one in times[name])
    ours, unit = times["forgetcast"], times["forward"]
    passes = 1 + 1.1 * JOBS[job]["c"]
    result["floor_forward_passes"] = passes
    result["fraction_of_floor"] = {
        kind: median(passes * f[kind] / o[kind] for f, o in zip(unit, ours, strict=True)) for kind in ("wall", "cpu")
    }
    result["others_over_ours"] = {
        name: {
            "of_minima": min(t["cpu"] for t in times[name]) / share_of(name, job) / min(t["cpu"] for t in ours),
            "median": median(t["cpu"] / share_of(name, job) / o["cpu"] for t, o in zip(times[name], ours, strict=True)),
        }
        for name in racing
        if name not in ("forgetcast", "forward")
    }
    return result


def share_of(name: str, job: str) -> float:
    columns = COLUMNS[job] if name == "curvlinops" else None
    return 1.0 if columns is None else columns / (JOBS[job]["n"] * JOBS[job]["c"])


def run() -> dict[str, Any]:
    from benchmarks.machine import floor

    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    result: dict[str, Any] = {
        "machine": floor(),
        "threads": threads,
        "rounds": ROUNDS,
        "tolerance": TOLERANCE,
        "checked_samples": CHECKED,
    }
    result["bars"] = {"slower_than_best": 1.1, "B1_each": 5.0, "B2_fraction_of_floor": 0.8}
    with tempfile.TemporaryDirectory() as folder:
        for job in JOBS:
            result[job] = race(job, folder, threads)
    missing = absent(result)
    if missing:
        result["missing"] = f"{', '.join(missing)} did not race: not installed where it ran. {SETUP}"
        print(result["missing"], file=sys.stderr)
    return result


def absent(result: dict[str, Any]) -> list[str]:
    """Contenders that no job could start because they are not installed."""
    entries = [result[job]["contenders"] for job in JOBS]
    return [name for name in CONTENDERS if any("not installed" in jobs[name].get("reason", "") for jobs in entries)]


if __name__ == "__main__":
    if len(sys.argv) == 4:
        worker(*sys.argv[1:])
    else:
        from benchmarks.machine import save

        save("kernel_race", run())
