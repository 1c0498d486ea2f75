r"""Slow learner with classifier alignment: a backbone that hardly moves, and a head re-trained on Gaussian classes.

align    min_W E_c E_{phi ~ N(mu_c, Sigma_c)} CE( f / (temperature |f|), c ),     f = W phi + b over the outputs seen
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from forgetcast.checks import require_integer, require_number
from forgetcast.methods.base import Model, State, TaskData
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.memory import task_features

JITTER = 1e-4
"""Added to the diagonal of a covariance, as in the authors' code, so that few samples still give a Cholesky factor."""


class SLCA(Sequential):
    """Fine-tuning with two rates, and alignment of the head after each task but the first.

    Args:
        model: backbone and head.
        backbone_rate: learning rate of the backbone.
        head_rate: learning rate of the head, also in the alignment.
        epochs: of the alignment.
        samples: features drawn a class and epoch.
        temperature: of the normalised logits.
        loss_outputs: as for `Sequential`; the paper's is "task".
        seed: of the drawn features.

    Attributes:
        statistics: "mean" (d,) and "root" (d, d), the Cholesky factor of the covariance, of each class.

    Cost: at `end_task` the task's features in memory, d^3 a new class, d^2 numbers a class for ever, and
    epochs x samples x classes features through the head.

    Source: arXiv 2303.05118, section 3; the norm |f| is over all outputs seen.
    """

    def __init__(
        self,
        model: Model,
        *,
        backbone_rate: float = 1e-4,
        head_rate: float = 1e-2,
        epochs: int = 5,
        samples: int = 256,
        temperature: float = 0.1,
        loss_outputs: str = "task",
        seed: int = 0,
    ) -> None:
        super().__init__(model, loss_outputs=loss_outputs)
        require_number("backbone_rate", backbone_rate)
        require_number("head_rate", head_rate)
        require_integer("epochs", epochs)
        require_integer("samples", samples, least=1)
        require_number("temperature", temperature, strict=True)
        self.backbone_rate = backbone_rate
        self.head_rate = head_rate
        self.epochs = epochs
        self.samples = samples
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(seed)
        self.statistics: dict[int, dict[str, Tensor]] = {}

    def plain_outputs(self) -> None:
        """None: there are two rates, and the head is trained again after the last step."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone at its rate and the head at its own; a part of which nothing trains is left out."""
        groups = []
        for part, rate in ((self.model.backbone, self.backbone_rate), (self.model.head, self.head_rate)):
            parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
            if parameters:
                groups.append({"params": parameters, "lr": rate})
        return groups

    def end_task(self, task: TaskData) -> None:
        """Measure the new classes, then align the head to all."""
        super().end_task(task)
        features, labels = task_features(self.model, task)
        for label in sorted(set(labels.tolist())):
            phi = features[labels == label].double()  # fewer samples than features leave only JITTER to stand on
            mean = phi.mean(0)
            centred = phi - mean
            covariance = centred.T @ centred / max(len(phi) - 1, 1)
            covariance.diagonal().add_(JITTER)
            self.statistics[label] = {"mean": mean, "root": torch.linalg.cholesky(covariance)}
        if task.index > 0:
            self._align(task)

    def state_dict(self) -> State:
        """That of every method, the statistics and the generator."""
        statistics = {str(label): dict(values) for label, values in self.statistics.items()}
        return {**super().state_dict(), "statistics": statistics, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        super().load_state_dict(state)
        self.statistics = {int(label): dict(values) for label, values in state["statistics"].items()}
        self.generator.set_state(state["generator"].cpu())

    def _align(self, task: TaskData) -> None:
        head = self.model.head
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.head_rate, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.epochs, 1))
        seen = list(task.seen)
        for _ in range(self.epochs):
            features, labels = self._drawn(parameters[0])
            order = torch.randperm(len(labels), generator=self.generator).to(labels.device)
            for rows in torch.split(order, self.samples):
                logits = head(features[rows])
                unit = torch.full_like(logits, -torch.inf)
                unit[:, seen] = normalize(logits[:, seen]) / self.temperature
                optimizer.zero_grad()
                cross_entropy(unit, labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
        optimizer.zero_grad()

    def _drawn(self, like: Tensor) -> tuple[Tensor, Tensor]:
        parts, labels = [], []
        for label, values in self.statistics.items():
            mean, root = values["mean"].to(like), values["root"].to(like)
            noise = torch.randn(self.samples, len(mean), generator=self.generator).to(like)
            parts.append(mean + noise @ root.T)
            labels += [label] * self.samples
        return torch.cat(parts), torch.tensor(labels, device=like.device)
