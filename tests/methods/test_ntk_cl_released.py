"""The released recipe against numbers of the official code (tests/methods/ntk_cl_reference.safetensors).

How these were made: benchmarks/ntk_cl_reference.py.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from ntk_cl_drawn import as_stored, drawn, images
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from forgetcast.methods.base import Batch, TaskData
from forgetcast.methods.ntk_cl import NTKCL
from forgetcast.protect.contrast import pooled_infonce
from forgetcast.protect.orthogonal import leading_basis, signed_complement

FILE = Path(__file__).parent / "ntk_cl_reference.safetensors"
WIDTH, DEPTH, HEADS, KNOWN = 32, 3, 4, 45
CASES = ("plain", "pretrained", "initial")
NAMES = {
    "backbone.channel_prompt_list": "sections.branches.0.current",
    "backbone.pre_channel_prompt_list": "sections.branches.0.average",
    "backbone.patch_prompt_list": "sections.branches.1.current",
    "backbone.pre_patch_prompt_list": "sections.branches.1.average",
    "down_proj": "down",
    "up_proj": "up",
    "global_patch_prompt": "mix",
    "prompt_norm": "norm",
    "fusion_model": "fusion",
    "proxy_fc.sigma": "proxy.scale",
    "proxy_fc": "proxy",
}
COPIES = {
    "backbone.channel_prompt_list": "reg_channel_prompt_list",
    "backbone.patch_prompt_list": "reg_patch_prompt_list",
    "fusion_model": "reg_fusion_model",
}


@cache
def stored() -> dict[str, Tensor]:
    with safe_open(FILE, framework="pt") as file:
        return {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118 - no mapping


@cache
def about() -> dict:
    with safe_open(FILE, framework="pt") as file:
        return json.loads(file.metadata()["about"])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.proj(scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn = Attention()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """With the official names of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = (nn.Parameter(torch.zeros(1, count, WIDTH)) for count in (1, 197))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, 16, 16)})
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


def own_name(official: str) -> str:
    for theirs, ours in NAMES.items():
        official = official.replace(theirs, ours)
    return official


def value(case: str, official: str, shape) -> Tensor:
    """What a parameter starts from in a case."""
    if case == "initial" and "prompt_list" in official:
        official = official.replace("reg_", "backbone.", 1) if official.startswith("reg_") else official
        return stored().get(f"initial.weights.{official}", torch.zeros(shape))
    return drawn(official, shape).double()


def built(case: str, *, known: int = KNOWN) -> NTKCL:
    """At the beginning of the task that brings three classes, in float64, without dropout."""
    backbone = ViT().double()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(drawn(f"backbone.{name}", parameter.shape))
    options = {"prompts": 3, "rank": 4, "dropout": 0.0, "pretrained": case == "pretrained", "contrast": 0.03}
    method = NTKCL(backbone, WIDTH, recipe="released", tasks=9, **options)
    network = method.network
    network.build(197, True)
    network.double()
    network.fusion.drop = 0.0
    head = method.model.head
    head.grow(known)
    if known:
        head.sums.copy_(drawn("fc.weight", (known, head.width)))
        head.counts.fill_(1)
        head.solve()
    seen = tuple(range(known + 3))
    batch = Batch(images("images", 4).double(), torch.tensor(about()["labels"]) - KNOWN + known, torch.arange(4))
    method.begin_task(TaskData(1, seen[known:], seen, lambda: iter([batch])))
    network.double()
    with torch.no_grad():
        for theirs, ours in zip(about()["trainable"], map(own_name, about()["trainable"]), strict=True):
            parameter = network.get_parameter(ours)
            parameter.copy_(value(case, theirs, parameter.shape).reshape(parameter.shape))
            averaged = theirs.replace("backbone.", "backbone.pre_")
            if averaged != theirs:
                network.get_parameter(own_name(averaged)).copy_(value(case, averaged, parameter.shape))
    for theirs, copy in COPIES.items():
        for name in [name for name in about()["trainable"] if name.startswith(theirs) and name.endswith("weight")]:
            own = own_name(name)
            start = name if case == "initial" and "prompt_list" in name else name.replace(theirs, copy)
            start = name if case == "initial" else start
            method.before[own] = value(case, start, method.before[own].shape)
    return method


def close(found: Tensor, key: str, **tolerance) -> None:
    given = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    found = found.detach().double()
    found = found if found.ndim else found[None]  # sigma
    torch.testing.assert_close(as_stored(found, stored()[key]), stored()[key], **given)


def batch_of(method: NTKCL) -> Batch:
    labels = torch.tensor(about()["labels"]) - KNOWN + len(method.old)
    return Batch(images("images", 4).double(), labels, torch.arange(4))


def rows_taken(method: NTKCL, monkeypatch, rows: list[int]) -> None:
    """The old means that the official run happened to draw."""
    drawn_rows = torch.tensor(rows, dtype=torch.int64)
    monkeypatch.setattr("forgetcast.methods.ntk_cl.torch.randperm", lambda *_, **__: drawn_rows, raising=True)


@pytest.mark.parametrize("case", CASES)
def test_features_of_all_branches(case):
    method = built(case)
    method.model.eval()
    for name, found in zip(
        ("channel", "patch", "fused"), method.network.three(images("images", 4).double()), strict=True
    ):
        close(found, f"{case}.features.{name}")


@pytest.mark.parametrize("case", CASES)
def test_every_term_of_the_loss(case, monkeypatch):
    method = built(case)
    method.model.train()
    batch, want = batch_of(method), {key: stored()[f"{case}.terms.{key}"] for key in about()["terms"] + ["total"]}
    features = method.network.three(batch.inputs)
    for name, z in zip(("channel", "patch", "fused"), features, strict=True):
        logits = method.network.proxy(z)
        close(logits, f"{case}.logits.{name}")
        torch.testing.assert_close(
            cross_entropy(logits, batch.labels - KNOWN).double(), want[f"ce_{name}"], rtol=1e-5, atol=0
        )
    rows_taken(method, monkeypatch, about()["selected_rows"])
    found = method._contrast(features[2], batch.labels)
    torch.testing.assert_close(found, want["l_mi"], rtol=1e-5, atol=0)
    found = method._orthogonality(batch, *features[:2])
    torch.testing.assert_close(found, want["l_svd"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.loss(batch), want["total"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_two_steps(case, monkeypatch):
    method = built(case)
    method.model.train()
    rows_taken(method, monkeypatch, about()["selected_rows"])
    named = {theirs: method.network.get_parameter(own_name(theirs)) for theirs in about()["trainable"]}
    assert {id(value) for value in named.values()} == {
        id(value) for group in method.parameter_groups() for value in group["params"]
    }
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.025, momentum=0.9, weight_decay=5e-4)
    kept = [name for name in named if case != "initial" or not name.startswith("fusion_model")]
    for step in (1, 2):
        optimizer.zero_grad()
        method.loss(batch_of(method)).backward()
        if step == 1:
            for name in kept:
                close(named[name].grad, f"{case}.gradient.{name}", atol=1e-7)
        optimizer.step()
        for name in kept:
            close(named[name], f"{case}.step{step}.{name}", atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_prototypes_and_answers(case):
    method = built(case)
    inputs, labels = images("prototypes", 6).double(), torch.tensor(about()["prototype_labels"])
    task = TaskData(8, (45, 46, 47), tuple(range(48)), lambda: iter([Batch(inputs, labels, torch.arange(6))]))
    method.end_task(task)  # the ninth of nine, which released averaging leaves out
    close(method.model.head.means[KNOWN:], f"{case}.prototypes")
    logits = method.predict(images("images", 4).double())
    close(logits, f"{case}.test_logits.fused")


@pytest.mark.parametrize("known", [6, 0])
def test_contrast_with_few_or_no_old_classes(known, monkeypatch):
    method = built("plain", known=known)
    method.model.train()
    features = method.network.three(batch_of(method).inputs)
    key = "few" if known else "first"
    rows_taken(method, monkeypatch, about()["few"]["selected_rows"] if known else [])
    torch.testing.assert_close(
        method._contrast(features[2], batch_of(method).labels), stored()[f"plain.{key}.l_mi"], rtol=1e-5, atol=0
    )


def test_running_means_leave_out_the_last_task():
    method = built("plain")
    sections = method.network.sections
    prefixes = {"channel_prompt_list.0": sections.branches[0], "patch_prompt_list.0": sections.branches[1]}
    batch = batch_of(method)
    for task in range(9):
        for prefix, branch in prefixes.items():
            for name, parameter in branch.current[0].named_parameters():
                theirs = {"mix": "global_patch_prompt", "norm": "prompt_norm", "down": "down_proj", "up": "up_proj"}
                part, _, kind = name.partition(".")
                with torch.no_grad():
                    parameter.copy_(drawn(f"task{task}.{prefix}.{theirs[part]}.{kind}", parameter.shape))
        before = {name: value.clone() for name, value in sections.branches[0].average[0].named_parameters()}
        method.end_task(TaskData(task, (45, 46, 47), tuple(range(48)), lambda: iter([batch])))
        if task < 3:
            for prefix, branch in prefixes.items():
                for name, parameter in branch.average[0].named_parameters():
                    part, _, kind = name.partition(".")
                    close(parameter, f"average.{task}.{prefix}.{theirs[part]}.{kind}")
        if task == 8:
            after = dict(sections.branches[0].average[0].named_parameters())
            assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_terms_by_themselves():
    prototypes = drawn("fc.weight", (45, 64)).double()
    z = {name: stored()[f"plain.features.{name}"] for name in ("channel", "patch", "fused")}
    basis = leading_basis(torch.cat([prototypes, torch.zeros(3, 64, dtype=torch.float64)]))
    found = signed_complement(z["channel"], basis) + signed_complement(z["patch"], basis)
    torch.testing.assert_close(found, stored()["plain.terms.l_svd"], rtol=1e-4, atol=1e-5)
    rows = torch.tensor(about()["selected_rows"])
    labels = torch.cat([torch.tensor(about()["labels"]), rows])
    value_, _ = pooled_infonce(torch.cat([z["fused"], prototypes[rows]]), labels)
    torch.testing.assert_close(-value_, stored()["plain.terms.l_mi"], rtol=1e-5, atol=0)


def test_number_of_parameters_at_the_size_of_the_paper():
    from forgetcast.heads.fusion import OneToken
    from forgetcast.tuners.adapter import Bottleneck
    from forgetcast.tuners.generated import Generator

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        assert 12 * count(Generator(197, 10, 768, zero=True)) == 42_192
        assert 12 * count(Bottleneck(768, 768, 16, "relu", 0.1, True)) == 304_320
        assert [count(OneToken(768 * sections)) for sections in (2, 3)] == [7_082_496, 15_932_160]
