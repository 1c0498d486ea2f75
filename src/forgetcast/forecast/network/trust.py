r"""How far a forecast is to be trusted, from what it measured of itself."""

from dataclasses import dataclass
from math import sqrt

TRUSTED_COSINE = 0.8


@dataclass(frozen=True)
class SamplingError:
    """Of an old drift, relative to its size.

    Attributes:
        all: over all outputs.
        old: over the outputs of the old samples' own classes. None without labels, or where these outputs stand still.
    """

    all: float
    old: float | None


@dataclass(frozen=True)
class Trust:
    r"""A forecast's own check.

        expected cosine = 1 / sqrt(1 + sampling_error^2 + surrogate_error^2)

    It is that of the whole drift. Which of the old classes suffer most hangs on the drift of their own outputs, which
    is the smaller part of it and harder to tell: `expected_old_cosine`. The two are trusted each by itself.

    Attributes:
        sampling_error: `||A - B|| / (2 ||whole||)` of the old drifts that two halves of the forecast predict, which
            have read different samples, over all outputs and over those of the old classes (`sampling`). None if not
            measured.
        surrogate_error: `||predicted - actual|| / ||actual||` of the features' motion from one anchor to the next,
            along the surrogate's directions, on samples read again. None for one anchor, or an exact path.
        blind: mean share of the loss's gradient at the features that the surrogate could not see.
        degenerate: the new rows of the head are equal, so that the body has no tangent at the start.
        exact: the forecast is the training itself, or that of a linear head.
        silent: no sample of the first anchor has a gradient outside the head: an adapter whose factors are all zero.
    """

    sampling_error: SamplingError | None
    surrogate_error: float | None
    blind: float
    degenerate: bool
    exact: bool = False
    silent: bool = False

    @property
    def expected_cosine(self) -> float | None:
        """Cosine to the measured drift that the forecast expects of itself; None if nothing was measured."""
        if self.exact:
            return 1.0
        return self._expected(None if self.sampling_error is None else self.sampling_error.all)

    @property
    def expected_old_cosine(self) -> float | None:
        """The same of the drift of the old classes' own outputs; None where that was not measured."""
        if self.exact:
            return 1.0
        known = None if self.sampling_error is None else self.sampling_error.old
        return None if known is None else self._expected(known)

    def _expected(self, sampling: float | None) -> float | None:
        known = [error for error in (sampling, self.surrogate_error) if error is not None]
        return 1 / sqrt(1 + sum(error**2 for error in known)) if known else None

    @property
    def trusted(self) -> bool:
        """Whether the expected cosine is at least 0.8; a forecast that could not check itself is not trusted."""
        return self.expected_cosine is not None and self.expected_cosine >= TRUSTED_COSINE

    @property
    def order_trusted(self) -> bool:
        """Whether the order in which old classes suffer is: `expected_old_cosine` is at least 0.8."""
        return self.expected_old_cosine is not None and self.expected_old_cosine >= TRUSTED_COSINE

    @property
    def reason(self) -> str:
        """Why, in words."""
        if self.exact:
            return "exact"
        if self.expected_cosine is None:
            return "not to be trusted: nothing to check it by (only 'anchored' checks itself, on several samples)"
        parts = {
            "few samples read": None if self.sampling_error is None else self.sampling_error.all,
            "anchors too far apart": self.surrogate_error,
        }
        worst = max((name for name, value in parts.items() if value is not None), key=lambda name: parts[name] or 0)
        verdict = "to be trusted" if self.trusted else f"not to be trusted ({worst}: raise the budget"
        remedy = "" if self.trusted else (", or place the head first)" if self.degenerate else ")")
        old = self.expected_old_cosine
        doubt = "" if self.order_trusted else ": which of them suffer most is not to be trusted"
        order = "" if old is None else f"; of the old classes' own outputs {old:.2f}{doubt}"
        dead = "; nothing outside the head has a gradient at the start: initialise it away from zero"
        return f"expected cosine {self.expected_cosine:.2f}, {verdict}{remedy}{order}{dead if self.silent else ''}"
