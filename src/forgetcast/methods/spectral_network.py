"""Fine-tuning of all that trains, the outputs of earlier tasks held along their vulnerable modes."""

from forgetcast.checks import complaint, require_choice
from forgetcast.methods.base import Model, Protection
from forgetcast.methods.sequential import Sequential
from forgetcast.protect.spectral_network import SpectralDirections, SpectralProbes


class SpectralNetwork(Sequential):
    """Fine-tuning under `SpectralProbes` or `SpectralDirections`.

    For a head alone, on frozen features, there is `Spectral`.

    Args:
        model: backbone and head.
        strength: mu.
        modes: k, for each task.
        probes: training samples of each task whose outputs are held.
        form: "probes", which keeps these samples and passes them at every step, or "data_free", which keeps directions
            of the parameters and holds the outputs to first order.
        later: outputs of later tasks are "held" at zero on the old probes, or "free".
        rank: directions kept over all tasks by the data-free form; None keeps all.
        loss_outputs: as for `Sequential`.
        seed: of the choice of probes.

    Source: arXiv 2606.18024.
    """

    def __init__(
        self,
        model: Model,
        strength: float = 0.3,
        modes: int = 100,
        *,
        probes: int = 100,
        form: str = "probes",
        later: str = "held",
        rank: int | None = None,
        loss_outputs: str = "seen",
        seed: int = 0,
    ) -> None:
        require_choice("form", form, ("probes", "data_free"))
        if form == "probes" and rank is not None:
            raise complaint(f"got rank={rank} with form='probes'", "no rank", "Leave it out, or set form='data_free'.")
        protection: Protection
        if form == "probes":
            protection = SpectralProbes(strength, modes, probes=probes, later=later, seed=seed)
        else:
            protection = SpectralDirections(strength, modes, probes=probes, later=later, rank=rank, seed=seed)
        super().__init__(model, [protection], loss_outputs=loss_outputs)
