r"""NTK-CL: three features of each sample, running means of what made them, and a classifier of class means by section.

    features     z_a adapters, z_p prompts, z_f both fused; each [pretrained (optional), averaged, current] wide
    before it    proxies w_c of the task's classes at their means of z_f as it is
    loss         CE(z_a) + CE(z_p) + CE(z_f) over the task's classes, of sigma cos(z, w_c); sigma and w_c anew each task
                 + contrast L_c(z_f) + orthogonality L_o(z_a, z_p) + drift sum |W - W_before|^2
    after it     the running mean takes the current parts in; old means of z_f follow the drift; means of new classes
    answer       argmax_c sum_s m_s cos(z_{f,s}, mean_{c,s})

The recipe "released" does what the authors' code does, the recipe "corrected" what the paper says; each way can be
chosen alone (docs/ntk_cl.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from forgetcast.checks import complaint, require_choice, require_integer, require_number
from forgetcast.heads.cosine import Cosine
from forgetcast.heads.fusion import OneToken, SectionAttention
from forgetcast.heads.prototype import Prototype
from forgetcast.heads.sectioned import Sectioned
from forgetcast.methods.base import Batch, Method, Model, State, TaskData, places_among
from forgetcast.modes import evaluating
from forgetcast.protect.contrast import pooled_infonce, supervised_infonce
from forgetcast.protect.gaussians import section_shifts
from forgetcast.protect.memory import task_features
from forgetcast.protect.orthogonal import leading_basis, old_basis, overlap, signed_complement
from forgetcast.protect.processes import of_whole_batch, own_rows
from forgetcast.tuners.adapter import Bottleneck
from forgetcast.tuners.anatomy import Anatomy, anatomy
from forgetcast.tuners.first_token import reads_first_token_alone
from forgetcast.tuners.fused import FusedSections
from forgetcast.tuners.generated import Added, Gated, Generator, Inserted, Read
from forgetcast.tuners.sections import Branch, Sections, tokens_of, width_of

Way = Literal["corrected", "released"]
WAYS: tuple[Way, ...] = ("corrected", "released")


@dataclass(frozen=True)
class Ways:
    """Of each part, the corrected way or the released one.

    Attributes:
        prompts: read through gates, or inserted as constants.
        fusion: attention among sections, or of one token to itself.
        contrast: pulls a class together and away from old means, or pushes it apart.
        orthogonality: falls with the energy in the span of old means, or with the signed sum of what is outside.
        averaging: averaged adapters without dropout and the last task in the mean, or with it and without the task.
        proxies: at first class means of the features as they are, at scale 20, or random directions at scale 1.
        prototypes: old class means follow the drift of the features, or stay.
    """

    prompts: Way = "corrected"
    fusion: Way = "corrected"
    contrast: Way = "corrected"
    orthogonality: Way = "corrected"
    averaging: Way = "corrected"
    proxies: Way = "corrected"
    prototypes: Way = "corrected"

    def __post_init__(self) -> None:
        for one in fields(self):
            require_choice(one.name, getattr(self, one.name), WAYS)


class NTKCL(Method):
    """NTK-CL on a transformer.

    Args:
        backbone: a frozen transformer that normalises before attention and before its feed-forward networks.
        width: of its features.
        recipe: "corrected", or "released" as the authors' code.
        ways: by part, where it is to be done otherwise than the recipe says: `Ways`.
        prompts: p, made in each block.
        rank: of the adapters' bottlenecks.
        dropout: in them.
        scale: of adapters, and of the prompts of the block before.
        pretrained: whether there is a section without adapters and prompts.
        section_weights: m, in the order of sections; by default (1, 0.3, 0.1), or (0.3, 0.1) without the first.
        fusion_rank: of the corrected fusion.
        contrast: weight of its term.
        orthogonality: weight of its term; by default 1e-4 for the released form, 0.1 for the corrected one.
        drift: weight of its term.
        proxy_scale: sigma at the start of a task; by default 1 for the released proxies, 20 for the corrected ones.
        bandwidth: how far old means look for samples that tell where they went, `section_shifts`.
        decay: of an exponential running mean; None for the uniform one.
        tasks: how many there will be, so that released averaging can leave out the last.
        parts: where the blocks are; found by name.
        seed: of which old means released contrast draws.

    Attributes:
        began: what was read of the task's samples when it began: "features", while old means are to be moved by them,
            and "standing", sections that stand still in the task, with the "places" of their samples in rising order.
        skipped: batches without a pair for the contrast.

    Cost: a step makes two passes forward and backward. Where samples are augmented, or averaged adapters have dropout,
    it makes two more forward, three with `pretrained`; else these are made once a task, which begins and ends with its
    features. Memory: the parts three times (current, averaged, before), S d numbers a class, and in a task up to
    (3 S - 2) d numbers a sample.

    Source: arXiv 2407.17120.
    """

    needs_blocks = True

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        recipe: Way = "corrected",
        ways: Mapping[str, Way] | None = None,
        prompts: int = 10,
        rank: int = 16,
        dropout: float = 0.1,
        scale: float = 0.1,
        pretrained: bool = False,
        section_weights: Sequence[float] | None = None,
        fusion_rank: int = 32,
        contrast: float = 0.2,
        orthogonality: float | None = None,
        drift: float = 1e-3,
        proxy_scale: float | None = None,
        bandwidth: float = 1.0,
        decay: float | None = None,
        tasks: int | None = None,
        parts: Anatomy | None = None,
        seed: int = 0,
    ) -> None:
        require_choice("recipe", recipe, WAYS)
        require_integer("prompts", prompts, least=1)
        require_integer("rank", rank, least=1)
        require_number("dropout", dropout, most=1.0)
        require_number("scale", scale, strict=True)
        for name, value in (("contrast", contrast), ("orthogonality", orthogonality), ("drift", drift)):
            if value is not None:
                require_number(name, value)
        require_number("bandwidth", bandwidth, strict=True)
        if proxy_scale is not None:
            require_number("proxy_scale", proxy_scale, strict=True)
        known = {one.name for one in fields(Ways)}
        for name in ways or {}:
            require_choice("a part of ways", name, sorted(known))
        self.ways = replace(Ways(**dict.fromkeys(known, recipe)), **dict(ways or {}))
        if self.ways.averaging == "released" and tasks is None:
            raise complaint("released averaging without `tasks`", "how many tasks there will be", "Give tasks=10.")
        weights = ((1.0,) if pretrained else ()) + (0.3, 0.1) if section_weights is None else tuple(section_weights)
        if len(weights) != 2 + pretrained:
            raise complaint(
                f"{len(weights)} section_weights with pretrained={pretrained}",
                f"{2 + pretrained}: {'pretrained, ' if pretrained else ''}averaged, current",
                "Give one for each section.",
            )
        parts = anatomy(backbone) if parts is None else parts
        self.prompts, self.rank, self.dropout, self.scale = prompts, rank, dropout, scale
        self.pretrained, self.fusion_rank = pretrained, fusion_rank
        corrected = self.ways.orthogonality == "corrected"
        self.contrast, self.drift = contrast, drift
        self.orthogonality = (0.1 if corrected else 1e-4) if orthogonality is None else orthogonality
        self.proxy_scale = (20.0 if self.ways.proxies == "corrected" else 1.0) if proxy_scale is None else proxy_scale
        self.bandwidth, self.decay, self.tasks = bandwidth, decay, tasks
        self.generator = torch.Generator().manual_seed(seed)
        self.before: dict[str, Tensor] = {}
        self.old: tuple[int, ...] = ()
        self.means = torch.zeros(0, width * len(weights))
        self.basis: Tensor | None = None
        self.began: dict[str, Tensor] = {}
        self.skipped = 0
        super().__init__(
            Model(FusedSections(backbone, parts, self._made), Sectioned(width * len(weights), weights=weights))
        )

    @property
    def network(self) -> FusedSections:
        """What makes the features."""
        found = self.model.backbone
        assert isinstance(found, FusedSections)
        return found

    @property
    def head(self) -> Sectioned:
        """The class means."""
        found = self.model.head
        assert isinstance(found, Sectioned)
        return found

    def begin_task(self, task: TaskData) -> None:
        """New proxies, and what the terms compare with."""
        backbone, parts = self.network.backbone, self.network.parts
        if backbone is not None:
            inputs = next(iter(task.batches())).inputs[:2]
            with evaluating(backbone):
                alone = reads_first_token_alone(backbone, parts, inputs)
            self.network.build(tokens_of(backbone, parts, inputs), alone)
        super().begin_task(task)
        proxy = self.network.propose(len(task.classes), self.proxy_scale)
        follows = self.ways.prototypes == "corrected" and bool(self.head.counts.any())
        if follows or self.ways.proxies == "corrected":
            self._read(task, proxy, follows)
        self._compare([output for output in task.seen if output not in task.classes])
        self.before = self.before or self._copied()

    def loss(self, batch: Batch) -> Tensor:
        """The sum of all terms.

        Raises:
            ValueError: a sample of a class that the task does not bring.
        """
        proxy = self.network.proxy
        assert proxy is not None
        adapters, prompts, fused = self.network.three(batch.inputs, self._standing(batch.indices))
        places = places_among(self.classes, batch.labels)
        total = sum((cross_entropy(proxy(z), places) for z in (adapters, prompts, fused)), start=fused.new_zeros(()))
        moved = (now - self.before[name].to(now) for name, now in self._weights().items())
        drift = sum((part.square().sum() for part in moved), start=total.new_zeros(()))
        return (
            total
            + self.contrast * of_whole_batch(batch, fused, self._contrast)
            + self.orthogonality * self._orthogonality(batch, adapters, prompts)
            + self.drift * drift
        )

    def end_task(self, task: TaskData) -> None:
        """Running means, then class means of the fused feature: old ones where they went, and new ones."""
        sections = self.network.sections
        assert sections is not None
        if self.ways.averaging == "corrected" or task.index + 1 < (self.tasks or 0):
            sections.fold(task.index, self.decay)
        features, labels = task_features(self.model, task)
        if "features" in self.began:
            known = self.head.counts > 0
            before = self.began["features"].to(features)
            moves = section_shifts(self.head.means[known], before, features, sections.count, self.bandwidth)
            self.head.move(known, moves)
        self.began = {}
        self.head.observe(features, labels)
        self.head.solve()
        self.before = self._copied()
        super().end_task(task)

    def predict(self, inputs: Tensor) -> Float[Tensor, "n C"]:
        """Logits in evaluation mode."""
        with torch.no_grad(), evaluating(self.model):
            return super().predict(inputs)

    def state_dict(self) -> State:
        """That of every method, and what a fresh one needs to be of the same shape."""
        network = self.network
        own = {
            "tokens": network.tokens,
            "first_token": network.first_token,
            "proxies": 0 if network.proxy is None else len(network.proxy.weight),
            "began": dict(self.began),
            "before": dict(self.before),
            "old": list(self.old),
            "skipped": self.skipped,
            "generator": self.generator.get_state(),
        }
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if state["tokens"]:
            self.network.build(state["tokens"], state["first_token"])
            self.network.propose(state["proxies"], self.proxy_scale)
        super().load_state_dict(state)
        self.before, self.skipped = dict(state["before"]), state["skipped"]
        self.began = dict(state["began"])
        self.generator.set_state(state["generator"].cpu())
        self._compare(state["old"])

    def _read(self, task: TaskData, proxy: Cosine, follows: bool) -> None:
        """What the task takes from its samples before it trains.

        Raises:
            ValueError: a task without batches.
        """
        sections, fusion = self.network.sections, self.network.fusion
        assert sections is not None
        assert fusion is not None
        read = []
        with torch.no_grad(), evaluating(self.model):
            for batch in task.batches():
                found = sections(batch.inputs)
                read.append((fusion(found).flatten(1), found[:, :, :-1], batch.labels, batch.indices))
        if not read:
            raise complaint("a task without batches", "at least one", "Let `TaskData.batches` read the task.")
        features, standing, labels, indices = (torch.cat(part) for part in zip(*read, strict=True))
        if follows:
            self.began["features"] = features
        if self.ways.averaging == "corrected" and not task.augmented:
            order = indices.argsort()
            self.began |= {"standing": standing[order], "places": indices[order]}
        if self.ways.proxies == "corrected":
            means = Prototype(features.shape[1], len(self.classes)).to(features.device)
            means.observe(features, places_among(self.classes, labels))
            there = means.counts > 0
            proxy.weight.data[there] = normalize(means.means[there]).to(proxy.weight)

    def _standing(self, indices: Tensor) -> Tensor | None:
        """The sections of some samples that stand still, where all of them were read."""
        if "places" not in self.began:
            return None
        places, standing = (self.began[name].to(indices.device) for name in ("places", "standing"))
        rows = torch.searchsorted(places, indices).clamp_max(len(places) - 1)
        return standing[rows] if bool((places[rows] == indices).all()) else None

    def _compare(self, old: Sequence[int]) -> None:
        """Take note of the means of outputs that this task does not bring."""
        self.old, every = tuple(old), self.head.means.float()
        self.means = every[list(old)]
        if self.ways.orthogonality == "released":
            blank = torch.ones(len(every), dtype=torch.bool, device=every.device)
            blank[list(old)] = False
            self.basis = leading_basis(every.masked_fill(blank[:, None], 0))
        else:
            self.basis = old_basis(self.means)

    def _contrast(self, fused: Tensor, labels: Tensor) -> Tensor:
        means = self.means.to(fused.device)
        if self.ways.contrast == "corrected":
            term, anchors = supervised_infonce(fused, labels, means)
            self.skipped += anchors == 0
            return term
        rows = torch.randperm(len(means), generator=self.generator)[: len(fused)].to(fused.device)
        own = torch.tensor(self.old, dtype=torch.int64, device=fused.device)[rows]
        term, pairs = pooled_infonce(torch.cat([fused, means[rows]]), torch.cat([labels, own]))
        self.skipped += pairs == 0
        return -term

    def _orthogonality(self, batch: Batch, adapters: Tensor, prompts: Tensor) -> Tensor:
        assert self.basis is not None
        basis = self.basis.to(adapters.device)
        if self.ways.orthogonality == "corrected":
            return overlap(adapters, basis) + overlap(prompts, basis)
        total = signed_complement(adapters, basis) + signed_complement(prompts, basis)
        return total if batch.rows is None else total * (batch.rows / max(own_rows(batch), 1))

    def _weights(self) -> dict[str, nn.Parameter]:
        """What the drift term is about: weights of the current parts and of the fusion."""
        named = self.network.named_parameters()
        held = {name: value for name, value in named if value.requires_grad and name.endswith("weight")}
        return {name: value for name, value in held.items() if not name.startswith("proxy.")}

    def _copied(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._weights().items()}

    def _made(self, backbone: nn.Module, tokens: int, first_token: bool) -> tuple[Sections, nn.Module]:
        network, ways = self.network, self.ways
        width, blocks = width_of(backbone, network.parts), len(network.parts.blocks)
        adapter = partial(Bottleneck, width, width, self.rank, "relu", self.scale, True, self.dropout)
        adapters = Branch(adapter, blocks, Added)
        if ways.prompts == "corrected":
            read = partial(Gated, tokens, self.prompts, width)
            prompts = Branch(read, blocks, partial(Read, scale=self.scale))
        else:
            inserted = partial(Generator, tokens, self.prompts, width, zero=True)
            prompts = Branch(inserted, blocks, partial(Inserted, length=self.prompts, scale=self.scale))
        sections = Sections(
            backbone,
            network.parts,
            (adapters, prompts),
            pretrained=self.pretrained,
            still=ways.averaging == "corrected",
            first_token=first_token,
        )
        if ways.fusion == "corrected":
            return sections, SectionAttention(width, self.fusion_rank)
        return sections, OneToken(width * sections.count)
