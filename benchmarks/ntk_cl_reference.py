"""Reference numbers from the official code of NTK-CL (arXiv 2407.17120), with which the recipe `released` is compared.

The official repository is GitHub Programmergg/NTK-CL (MIT) at commit 24de712; nothing of it is part of this project.
To make the numbers again, from the root of this project (seconds, on a CPU, without timm and easydict):

    git clone https://github.com/Programmergg/NTK-CL CHECKOUT && git -C CHECKOUT checkout 24de712
    python -m benchmarks.ntk_cl_reference CHECKOUT

which writes tests/methods/ntk_cl_reference.safetensors. Its tensors are float32; `metadata()["about"]` is JSON and says
what each of them is. The official modules run in float64; a second run in float32, as officially, tells how far apart
the two are. Weights and images are not stored: tests/methods/ntk_cl_drawn.py makes them from their names.

What differs from an official run: 32 wide, 3 blocks, 4 heads, 3 prompt tokens, bottleneck 4; all dropout off; the
rows that `torch.randperm` would draw are chosen; sections of `forward_reweight` are 32 wide instead of its fixed 768.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file
from tests.methods.ntk_cl_drawn import condensed, drawn, images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.ntk_cl_official import (
    BATCH,
    BLOBS,
    BOTTLENECK,
    COMMIT,
    DEPTH,
    HEADS,
    KNOWN,
    LISTS,
    NEW,
    RATIO,
    TOKENS,
    WEIGHTS,
    WIDTH,
    backbone,
    network,
    official,
    prototypes,
    settings,
)

TARGET = Path("tests/methods/ntk_cl_reference.safetensors")
CASES = {"plain": (False, False), "pretrained": (True, False), "initial": (False, True)}
FEATURES = ("channel", "patch", "fused")
LABELS, ROWS = (45, 46, 45, 47), (7, 0, 31, 18)
FEW, FEW_ROWS = 6, (5, 0, 3, 2)
PROTOTYPE_LABELS = (45, 46, 47, 47, 46, 45)
KEPT_TOKENS = (0, 1, 2, 3, 4, -1)
SGD = {"lr": 0.025, "momentum": 0.9, "weight_decay": 5e-4}
MULTIPLIERS = {"alpha": 0.1, "beta": 1.0, "gamma": 0.3}
WHOLE = 2000
Tensors = dict[str, Tensor]


def trainable(net: nn.Module) -> Tensors:
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def kept(name: str, tensors: Tensors) -> Tensors:
    """Copies under a common name; matrices of more than `WHOLE` entries condensed."""
    copies = {f"{name}.{key}": value.detach().clone() for key, value in tensors.items()}
    return {key: value if value.numel() <= WHOLE else condensed(value) for key, value in copies.items()}


def l_mi(net: Any, fused: Tensor, labels: Tensor, rows: tuple[int, ...]) -> Tensor:
    chosen = torch.tensor(rows, dtype=torch.long)
    return -net.nce_loss(torch.cat((fused, net.fc.weight[chosen])), torch.cat((labels, chosen)))


def terms_of(net: Any, pixels: Tensor, labels: Tensor) -> tuple[Tensors, Tensors]:
    """The terms of the loss, with the signs that they have in it, and the logits of the proxy head."""
    *outputs, l_svd = net(pixels, test=False)
    logits = {name: output["logits"] for name, output in zip(FEATURES, outputs, strict=True)}
    terms = {f"ce_{name}": cross_entropy(value, labels - KNOWN) for name, value in logits.items()}
    copies = [(getattr(net, f"reg_{name}"), getattr(net.backbone, name)) for name in LISTS]
    copies.append((net.reg_fusion_model, net.fusion_model))
    drifts = [
        (now - before).square().sum()
        for old, new in copies
        for (name, before), now in zip(old.named_parameters(), new.parameters(), strict=True)
        if "weight" in name
    ]
    l_reg = torch.stack(drifts).sum()
    return terms | {"l_mi": l_mi(net, outputs[2]["features"], labels, ROWS), "l_svd": l_svd, "l_reg": l_reg}, logits


def steps_of(modules: SimpleNamespace, net: Any, pixels: Tensor, labels: Tensor) -> Iterator[Tensors]:
    """The gradients of every step of the official training loop on this one batch, once the step is taken."""
    learner = object.__new__(modules.learner.PromptLearner)
    learner.args, learner._network, learner.weight_decay = net.args, net, SGD["weight_decay"]
    learner._cur_task, learner._known_classes = KNOWN // NEW, KNOWN
    optimizer = learner.get_optimizer(SGD["lr"])
    while True:
        torch.set_default_dtype(pixels.dtype)  # the loop sums its penalty in it
        with patch.object(torch, "randperm", lambda _count: torch.tensor(ROWS)):
            learner._init_train([(None, pixels, labels)], optimizer, None)
        torch.set_default_dtype(torch.float32)
        yield {name: parameter.grad for name, parameter in trainable(net).items()}


def token_outputs(net: Any, pixels: Tensor) -> Tensors:
    """What each block puts out for the first image, in both branches, with either list of prompts."""
    seen: dict[str, list[Tensor]] = {"channel": [], "patch": []}

    def remember(_block: nn.Module, _given: Any, options: dict[str, Any], output: Any) -> None:
        seen[options["mode"]].append(output[0][0])

    hooks = [block.register_forward_hook(remember, with_kwargs=True) for block in net.backbone.blocks]
    net.backbone(pixels)
    for hook in hooks:
        hook.remove()
    found = {}
    for branch, outputs in seen.items():
        for place, tokens in enumerate(outputs):
            name = f"tokens.{branch}.{('average', 'current')[place // DEPTH]}.{place % DEPTH}"
            found |= {name: tokens[list(KEPT_TOKENS)], f"{name}.norms": tokens.norm(dim=1)}
    return found


def evaluated(net: Any, pixels: Tensor, labels: Tensor) -> Tensors:
    """Features, prototypes and logits at test, and the terms that depend on how many prototypes there are."""
    pretrained = net.args.use_init_ptm
    net.eval()
    channel, patched, *_ = net.backbone(pixels, use_init_ptm=pretrained)
    features = dict(zip(FEATURES, (channel, patched, net.fusion_model(channel, patched)), strict=True))
    normalised = nn.functional.normalize(net.fc.weight, dim=1)
    found = kept("features", features) | {"singular_values": torch.linalg.svdvals(normalised)}

    halves = zip(
        images("prototypes", len(PROTOTYPE_LABELS)).to(pixels).split(3),
        torch.tensor(PROTOTYPE_LABELS).split(3),
        strict=True,
    )
    net.replace_fc(SimpleNamespace(labels=np.array(PROTOTYPE_LABELS)), [(None, *half) for half in halves])
    found["prototypes"] = net.fc.weight[KNOWN:].clone()
    score = partial(net.fc.forward_reweight, out_dim=WIDTH, use_init_ptm=pretrained, **MULTIPLIERS)
    found |= kept("test_logits", {name: score(value)["logits"] for name, value in features.items()})

    for name, known, rows in (("few", FEW, FEW_ROWS), ("first", 0, ())):
        prototypes(net, known)
        found[f"{name}.l_mi"] = l_mi(net, features["fused"], labels, rows)
        found[f"{name}.l_svd"] = net.orthogonalize_with_truncated_svd(*features.values())
    prototypes(net, KNOWN)
    return found


def trained(modules: SimpleNamespace, net: Any, pixels: Tensor, labels: Tensor, small_only: bool) -> Tensors:
    """Terms of the loss and their gradients, then two official steps."""
    net.train()
    names, parameters = zip(*trainable(net).items(), strict=True)
    gradients_of = partial(torch.autograd.grad, inputs=parameters, retain_graph=True, materialize_grads=True)
    terms, logits = terms_of(net, pixels, labels)
    total = torch.stack([WEIGHTS[name] * term for name, term in terms.items()]).sum()
    found = kept("logits", logits) | kept("terms", terms | {"total": total})
    of_terms = [torch.stack([part.norm() for part in gradients_of(term)]) for term in terms.values()]
    found["gradient_norms"] = torch.stack(of_terms)

    gradient = dict(zip(names, gradients_of(total), strict=True))
    of_interest = [name for name in names if not (small_only and name.startswith("fusion_model"))]
    for step, officially in zip((1, 2), steps_of(modules, net, pixels, labels), strict=False):
        if step == 1:
            torch.testing.assert_close(gradient, officially)
            found |= kept("gradient", {name: officially[name] for name in of_interest})
        after = trainable(net)
        found |= kept(f"step{step}", {name: after[name] for name in of_interest})
    return found


def averages(modules: SimpleNamespace, dtype: torch.dtype) -> Tensors:
    """The averaged prompts of block 0 after tasks 0, 1 and 2, at whose ends the prompts are drawn."""
    vit = backbone(modules, settings(False)).to(dtype)
    for name, parameter in vit.named_parameters():
        parameter.data.copy_(drawn(f"backbone.{name}", parameter.shape))
    found: Tensors = {}
    for task in range(3):
        for prompts in LISTS:
            current, average = getattr(vit, prompts), getattr(vit, f"pre_{prompts}")
            for name, parameter in current.named_parameters():
                parameter.data.copy_(drawn(f"task{task}.{prompts}.{name}", parameter.shape))
            vit.update_ema(current, average, modules.learner.update_ratios(task))
            found |= kept(f"average.{task}.{prompts}", dict(average[0].named_parameters(prefix="0")))
    return found


def measured(modules: SimpleNamespace, dtype: torch.dtype) -> tuple[Tensors, list[str]]:
    """Everything stored, and the names of the trainable parameters in the order of `gradient_norms`."""
    found, names = averages(modules, dtype), []
    pixels, labels = images("images", BATCH).to(dtype), torch.tensor(LABELS)
    for name, (pretrained, initial) in CASES.items():
        net = network(modules, pretrained, initial, dtype)
        names = list(trainable(net))
        of_case = {}
        if initial:
            prompts = {key: value for key, value in net.backbone.named_parameters() if "prompt_list" in key}
            random = {key: value for key, value in prompts.items() if key.endswith("down_proj.weight")}
            assert not any(prompts[key].any() for key in prompts.keys() - random.keys())
            of_case |= kept("weights.backbone", random)
        with torch.no_grad():
            of_case |= evaluated(net, pixels, labels)
            if name == "plain":
                of_case |= token_outputs(net, pixels)
        of_case |= trained(modules, net, pixels, labels, small_only=initial)
        found |= {f"{name}.{key}": value for key, value in of_case.items()}
    return {name: value.detach() for name, value in found.items()}, names


def about(modules: SimpleNamespace, found: Tensors, rounded: Tensors, names: list[str]) -> dict[str, Any]:
    """What the tensors are, for whoever reads the file without this script."""
    arbitrary = [name for name in found if name.endswith((".few.l_svd", ".first.l_svd"))]
    gaps = {
        name: ((value - rounded[name]).abs().max() / value.abs().max().clamp(min=1e-3)).item()
        for name, value in found.items()
        if name not in arbitrary
    }
    return {
        "source": "GitHub Programmergg/NTK-CL, MIT; numbers computed by its code, no code of it included",
        "commit": COMMIT,
        "blobs": BLOBS,
        "made_by": "benchmarks/ntk_cl_reference.py",
        "torch": torch.__version__,
        "precision": "computed in float64, stored as float32",
        "largest_gap": {
            "what": "to the same run in float32, of the largest entry of a tensor (taken as at least 1e-3)",
            "of_largest_entry": max(gaps.values()),
            "in": max(gaps, key=gaps.__getitem__),
        },
        "model": {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": HEADS,
            "mlp_ratio": RATIO,
            "prompt_tokens": TOKENS,
            "bottleneck": BOTTLENECK,
            "fusion_heads": 8,
            "image": 224,
            "patch": 16,
            "layer_norm_eps": 1e-6,
            "prompt_scale": 0.1,
        },
        "dropout": "every dropout probability is 0, also in train mode (official: 0.1 in adapters and fusion)",
        "cases": {name: {"use_init_ptm": case[0], "official_initial_prompts": case[1]} for name, case in CASES.items()},
        "initial_prompts": (
            "prompts of both lists as officially initialised: down_proj.weight is stored under initial.weights, all "
            "others are 0; reg_ copies equal the start; the rest drawn; gradients and steps of the fusion not stored"
        ),
        "weights": "every parameter is drawn(official name, shape) of tests/methods/ntk_cl_drawn.py; fc.sigma is 1",
        "prototypes": f"fc.weight: drawn('fc.weight', ({KNOWN}, D)), then {NEW} zero rows, which replace_fc fills",
        "images": {"features and steps": ["images", BATCH], "replace_fc": ["prototypes", len(PROTOTYPE_LABELS)]},
        "images_sha256": {
            name: sha256(images(name, count).numpy().tobytes()).hexdigest()
            for name, count in (("images", BATCH), ("prototypes", len(PROTOTYPE_LABELS)))
        },
        "known_classes": KNOWN,
        "new_classes": NEW,
        "labels": LABELS,
        "prototype_labels": PROTOTYPE_LABELS,
        "selected_rows": ROWS,
        "few": {"known_classes": FEW, "selected_rows": FEW_ROWS},
        "first": {"known_classes": 0, "selected_rows": []},
        "loss": "sum of weight x term; l_mi is stored as in the loss, i.e. minus the InfoNCE",
        "terms": list(WEIGHTS),
        "term_weights": WEIGHTS,
        "svd_columns": 40,
        "sgd": SGD,
        "test_multipliers": MULTIPLIERS,
        "sections": {"plain": ["average", "current"], "pretrained": ["pretrained", "average", "current"]},
        "trainable": names,
        "gradient_norms": "(terms, trainable): norm of the gradient of each unweighted term",
        "gradient": "of the total, before the first step; step1 and step2: parameters after one and two steps",
        "average": "average.TASK.LIST.0: after drawn('taskTASK.LIST.0.NAME', shape) for tasks 0, 1, 2",
        "kept_tokens": KEPT_TOKENS,
        "average_ratios": [modules.learner.update_ratios(task) for task in range(3)],
        "condensed": f"matrices of more than {WHOLE} entries are stored as condensed of ntk_cl_drawn.py makes them",
        "implementation_defined": {
            "tensors": arbitrary,
            "why": "fewer than 40 non-zero prototypes: the remaining columns of U are any basis, LAPACK's choice",
        },
    }


if __name__ == "__main__":
    code = official(Path(sys.argv[1]))
    exact, order = measured(code, torch.float64)
    rounded, _ = measured(code, torch.float32)
    description = about(code, exact, rounded, order)
    stored = {name: value.float().contiguous() for name, value in exact.items()}
    save_file(stored, TARGET, {"about": json.dumps(description)})
    TARGET.chmod(0o644)
    print(f"{TARGET}: {len(stored)} tensors, {TARGET.stat().st_size} bytes; largest gap {description['largest_gap']}")
