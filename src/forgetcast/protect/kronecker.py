r"""Elastic weight consolidation with a Kronecker-factored Fisher for each linear layer.

    F_layer = A (x) G,    A = E a a^T  (inputs; a 1 appended for the bias),    G = E g g^T  (gradients at the output)
    L = L_new + strength / 2 sum_layers sum_tau tr( G_tau D A_tau D^T ),      D = [W b] - [W* b*] of the last task

Exact for one linear layer with squared loss, where G does not depend on the sample. Unlike the diagonal it sees that
two weights can move together without a change of the outputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_number
from forgetcast.methods.base import Batch, Model, Protection, State, TaskData
from forgetcast.modes import evaluating
from forgetcast.protect.fisher import output_scores, require_fisher
from forgetcast.protect.importance import require_samples
from forgetcast.protect.layers import LINEAR, linear_layers, recorded, stacked, with_one
from forgetcast.protect.parameters import leading


class KroneckerPenalty(Protection):
    """The penalty above on every trainable linear layer; other parameters are not held.

    Args:
        strength: lambda.
        fisher: "exact", "sampled" or "empirical", as for `FisherPenalty`.
        likelihood: "categorical" or "gaussian".
        layers: types of modules that map x to x W^T + b, with `weight` (outputs, inputs) and maybe `bias`.
        seed: of the sampled labels.

    Attributes:
        factors: for each ended task and each layer A ("inputs") and G ("outputs").
        anchor: [W b] of each layer when the last task ended.

    Positions of one sample (tokens) count as further samples for A and are summed for G.

    Cost: at `end_task` one pass with as many backward passes as outputs seen ("exact") or one; memory
    inputs^2 + outputs^2 a layer and task, as the sum of Kronecker products is none.

    Source: arXiv 1805.07810, eq. 8 and 10.
    """

    def __init__(
        self,
        strength: float,
        *,
        fisher: str = "exact",
        likelihood: str = "categorical",
        layers: Sequence[type[nn.Module]] = LINEAR,
        seed: int = 0,
    ) -> None:
        require_number("strength", strength)
        require_fisher(fisher, likelihood)
        self.strength = strength
        self.fisher = fisher
        self.likelihood = likelihood
        self.layers = tuple(layers)
        self.generator = torch.Generator().manual_seed(seed)
        self.factors: list[dict[str, dict[str, Tensor]]] = []
        self.anchor: dict[str, Tensor] = {}

    def loss(self, model: Model, batch: Batch, logits: Float[Tensor, "n C"]) -> Tensor | None:  # noqa: ARG002
        """The penalty now; none before the first task has ended."""
        terms = []
        for name, layer in linear_layers(model, self.layers).items():
            if name not in self.anchor:
                continue
            weight = stacked(layer)
            moved = leading(weight, self.anchor[name].shape) - self.anchor[name].to(weight)
            for factors in self.factors:
                if name in factors:
                    A, G = factors[name]["inputs"].to(weight), factors[name]["outputs"].to(weight)
                    D = moved[: len(G)]
                    terms.append(((G @ D @ A) * D).sum())
        return self.strength / 2 * torch.stack(terms).sum() if terms else None

    def end_task(self, model: Model, task: TaskData) -> None:
        """Measure the factors of the task that ends and move the anchor here."""
        linear = linear_layers(model, self.layers)
        if not linear:
            raise complaint(
                f"a model without trainable layers of the types {[layer.__name__ for layer in self.layers]}",
                "at least one",
                "Name the head's type in `layers`, or use the diagonal form.",
            )
        with evaluating(model):
            self.factors.append(self._factors(model, linear, task))
        self.anchor = {name: stacked(layer).detach().clone() for name, layer in linear.items()}

    def state_dict(self) -> State:
        """Factors, anchor and the generator of labels."""
        return {
            "factors": {
                str(i): {name: dict(pair) for name, pair in task.items()} for i, task in enumerate(self.factors)
            },
            "anchor": dict(self.anchor),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        tasks = state["factors"]
        self.factors = [{name: dict(pair) for name, pair in tasks[str(i)].items()} for i in range(len(tasks))]
        self.anchor = dict(state["anchor"])
        self.generator.set_state(state["generator"].cpu())

    def _factors(self, model: Model, linear: Mapping[str, nn.Module], task: TaskData) -> dict[str, dict[str, Tensor]]:
        A = {name: torch.zeros(()) for name in linear}
        G = {name: torch.zeros(()) for name in linear}
        positions = dict.fromkeys(linear, 0)
        count = 0
        for batch in task.batches():
            with torch.enable_grad(), recorded(linear) as uses:
                logits = model(batch.inputs)
            scores = output_scores(
                logits,
                batch.labels,
                task.seen,
                fisher=self.fisher,
                likelihood=self.likelihood,
                generator=self.generator,
            )
            for name, layer in linear.items():
                for inputs, _ in uses[name]:
                    a = with_one(layer, inputs.reshape(-1, inputs.shape[-1]))
                    A[name] = A[name].to(a) + a.T @ a
                    positions[name] += len(a)
            places = [(name, output) for name in linear for _, output in uses[name]]
            for score in scores:
                gradients = torch.autograd.grad(
                    logits, [output for _, output in places], score, retain_graph=True, materialize_grads=True
                )
                for (name, _), gradient in zip(places, gradients, strict=True):
                    g = gradient.reshape(-1, gradient.shape[-1])
                    G[name] = G[name].to(g) + g.T @ g
            count += len(batch.labels)
        require_samples(count)
        return {
            name: {"inputs": A[name] / positions[name], "outputs": G[name] / count}
            for name in linear
            if positions[name]
        }
