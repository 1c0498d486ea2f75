r"""Which share of the body's motion is the run's: two paths, each along every other anchor, and what they agree on.

Few samples leave noise in every step, and along directions in which the loss hardly curves nothing takes it back: the
motion theta_t - theta_0 of a path is that of the run and a random walk. Two walkers A and B, who have but the first
anchor in common, walk the same way and different noise. Of what one has walked the other explains

    c^2,        c = cos(theta_A - theta_0, theta_B - theta_0)

and only this share of the motion is believed: the path stands at theta_0 + c^2 (theta_t - theta_0). This is so where
heads are trained on features at hand (`Stock`): otherwise each half has but its own anchors to train a head on, and the
halves part for that.

A fresh head is followed with few samples at a time, as a pilot is (`steps`). Its walkers go the whole way, since head
and body learn together; but where the old samples are read, the body has made only the share

    min(2 c, 1)

of it. On a ViT c is about 0.1, and the noise in the motion that all features have in common would be most of the drift.

Source: derived; the square was set on twelve transitions, 2 c on ten (docs/network.md).
"""

from dataclasses import dataclass

from forgetcast.forecast.network.surrogate import TINY, Surrogate
from forgetcast.forecast.network.walker import Walker


@dataclass
class Halves:
    """Two walkers along every other anchor.

    Attributes:
        walkers: at the start; without generators.
    """

    walkers: tuple[Walker, Walker]
    count: int = 0

    def take(self, newest: Surrogate, most: int) -> float:
        """Give an anchor to the one whose turn it is, the first to both; of their own they use the last `most`.

        Returns:
            The share that is believed from here on.
        """
        share = self._share()
        for turn, walker in enumerate(self.walkers):
            walker.believed = share
            if self.count == 0 or self.count % 2 == turn:
                walker.take(newest, most, share)
        self.count += 1
        return share

    def step(self) -> None:
        """One step of both."""
        for walker in self.walkers:
            walker.step()

    def _share(self) -> float:
        """c^2, or 2 c; 0 where they have gone apart, 1 where none has moved or it cannot be told yet."""
        first, second = (walker.motion for walker in self.walkers)
        size = float(first.norm() * second.norm())
        few = self.walkers[0].batching.few
        if size <= TINY or self.count <= 2 or (self.walkers[0].stock is None and not few):
            return 1.0
        cosine = max(float(first @ second) / size, 0.0)
        return min(2 * cosine, 1.0) if few else cosine**2
