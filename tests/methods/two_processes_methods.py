"""Methods by name in one of two gloo processes; each writes what its methods end with."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from small import stream
from torch import Tensor, nn
from tuned import tuned_where_needed

from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Method
from forgetcast.methods.registry import create

# the second task has 96 samples: the last batch of an epoch has one, so that one process has none of its own
OPTIMIZATION = Optimization(optimizer="sgd", learning_rate=0.05, momentum=0.9, epochs=1, batch_size=95)
OPTIONS = {
    "slca": {"samples": 32, "epochs": 2, "backbone_rate": 1e-2},
    "ranpac": {"size": 100},
    "replay": {"capacity": 40, "count": 8},
    "der": {"capacity": 60, "count": 8},
    "der++": {"capacity": 60, "count": 8},
    "icarl": {"capacity": 30, "count": 8},
    "ewc": {"strength": 1.0},
    "pegp": {"threshold": 0.6},
    "ssiat": {"scale": 5.0, "samples": 32, "epochs": 2},
    "mos": {"rank": 8, "samples": 32, "epochs": 2, "contrast": 0.01, "dropout": 0.0},
    "vpt_nsp2": {"temperature": 1.0},
    "ntk_cl": {"prompts": 2, "rank": 4, "dropout": 0.0},
    "l2p": {"size": 5, "length": 2, "count": 2},
    "dualprompt": {"general_layers": (0,), "expert_layers": (1,)},
    "coda_prompt": {"components": 4, "layers": (0, 1), "orthogonality": 0.1},
    "ease": {"rank": 8, "dropout": 0.0},
    "inflora": {"rank": 4, "threshold": 0.6},
    "o_lora": {"rank": 4},
    "sd_lora": {"ranks": (4, 2)},
    # weights without close singular values, whose directions rounding mixes before they train
    "osf": {"ranks": (0.5, 0.7), "targets": ("enter", "leave")},
    "lae": {"decay": 0.9, "head_only": 0.5},
    "advised": {"budget": 1.0, "capacity": 40},
    "kronecker_ewc": {"strength": 1.0},
    # all modes: of fewer, what rounding does to the eigenvectors is divided by gaps between eigenvalues
    "spectral_network": {"strength": 0.05, "modes": 1000, "probes": 20},
}


def trained(name: str, accelerator: Accelerator | None = None) -> Method:
    torch.manual_seed(5)
    backbone = tuned_where_needed(name, nn.Sequential(nn.Linear(64, 20), nn.Tanh()), 20)
    method = create(name, backbone, 20, **OPTIONS.get(name, {}))
    learn(method, stream(), OPTIMIZATION, seed=3, accelerator=accelerator)
    return method


def tensors(state, path: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {key: value for name, own in items for key, value in tensors(own, f"{path}/{name}").items()}


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    ends = {name: tensors(trained(name, accelerator).state_dict()) for name in sys.argv[2:]}
    torch.save(ends, Path(sys.argv[1]) / f"{accelerator.process_index}.pt")
    accelerator.end_training()
