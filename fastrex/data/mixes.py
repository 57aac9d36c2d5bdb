"""Which images of a batch are mixed with one another, how and by how much: mixup and CutMix as draws; numpy only.

mixup (Zhang et al., ICLR 2018): x' = share x + (1 - share) x_partner. CutMix (Yun et al., ICCV 2019): a box of the
partner is pasted into the image. Both share ~ Beta(a, a), and the targets follow the share.

Images are mixed in pairs of places of the batch, at distance R = ``data.repeats`` within blocks of 2R places: then a
pair holds two draws of the epoch, never two views of one. Both places of a pair share one draw, each with the other as
its partner. An image is mixed with itself only where an epoch draws it twice in a row, as ``data.sampling = balanced``
may with a class of one image, or where it stands in for a bad file that was its partner (``data.on_bad_sample =
replace``).

With ``data.sampling = balanced`` and an even number of classes, partners are never of one class: the epoch draws blocks
of all classes, and no pair crosses two of them (of an odd number, some do). Sampling uniformly, they are by chance.

A pair's draw depends on the seed, the epoch and its place in the epoch alone (Philox counter: (pair, block, epoch,
purpose), see draws.py): not on the batch size, the rank, the number of ranks or the images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import AugmentConfig
from .draws import uniforms

# Of Johnk's method. One succeeds with a probability of at least 1/2 for a <= 1, so all fail less often than 2e-5.
TRIES = 16


@dataclass(frozen=True)
class MixPlan:
    """The draws of the pairs of a share of a batch, P = B / 2: pair p = block * R + r has the places 2R block + r and
    R beyond.

    distance: R. cut: bool [P], CutMix (else mixup). shares: float32 [P], how much of an image's target is its own; for
    mixup also of its pixels. boxes: float64 [P, 4], top, left, bottom and right of what CutMix pastes, as shares of the
    crop's side, within [0, 1].
    """

    distance: int
    cut: NDArray[np.bool_]
    shares: NDArray[np.float32]
    boxes: NDArray[np.float64]

    @property
    def partners(self) -> NDArray[np.int64]:
        """With which place each place is mixed, int64 [B]."""
        places = np.arange(2 * len(self.shares)).reshape(-1, 2, self.distance)
        return places[:, ::-1].reshape(-1)

    @property
    def own_shares(self) -> NDArray[np.float32]:
        """The share of each place, float32 [B]."""
        return self.shares[self._pairs]

    @property
    def own_cuts(self) -> NDArray[np.bool_]:
        """``cut`` of each place, bool [B]."""
        return self.cut[self._pairs]

    @property
    def _pairs(self) -> NDArray[np.int64]:
        """To which pair each place belongs, int64 [B]."""
        pairs = np.arange(len(self.shares)).reshape(-1, 1, self.distance)
        return np.repeat(pairs, 2, axis=1).reshape(-1)

    def first(self, places: int) -> MixPlan:
        """The draws of the first ``places``, whole blocks of 2R."""
        pairs = places // 2
        return MixPlan(self.distance, self.cut[:pairs], self.shares[:pairs], self.boxes[:pairs])


def mix_notices(augment: AugmentConfig, classes: int) -> list[str]:
    """What a user should know about images that are mixed; for the log. classes: drawn equally often, 0 for none."""
    if not augment.mixes:
        return []
    kinds = [f"{name} {a:g}" for name, a in (("mixup", augment.mixup), ("CutMix", augment.cutmix)) if a]
    either = f" (CutMix with probability {augment.mix_switch:g})" if len(kinds) == 2 else ""
    parted = classes > 0 and classes % 2 == 0
    apart = ["data.sampling=balanced: images are mixed with those of other classes alone"] if parted else []
    return [*apart, f"images are mixed in pairs: {' or '.join(kinds)}{either}; train/top1 is of the larger share"]


def draw_mixes(
    seed: int, epoch: int, start: int, count: int, distance: int, purpose: int, augment: AugmentConfig, side: int
) -> MixPlan:
    """The pairs of ``count`` places from ``start`` on, which are counted over the epoch.

    side: pixels of the crop whose pasted pixels decide the share (of other sizes it differs by their rounding).
    ValueError where ``start`` or ``count`` is no multiple of 2 ``distance``: pairs do not cross shares of a batch.
    """
    if start % (2 * distance) or count % (2 * distance):
        fact = f"multiples of {2 * distance} (two draws of data.repeats views), got {start} and {count}"
        raise ValueError(f"draw_mixes: start and count of a share that is mixed must be {fact}")
    first = start // 2
    counter = np.empty((4, 1 + TRIES // 2, count // 2), np.uint64)
    counter[0], counter[1] = np.arange(first, first + count // 2), np.arange(1 + TRIES // 2)[:, None]
    counter[2], counter[3] = epoch, purpose
    numbers = uniforms(counter, seed)
    switch, middle_y, middle_x = numbers[:3, 0]
    cut = switch < (augment.mix_switch if augment.mixup and augment.cutmix else float(augment.cutmix > 0))
    tries = numbers[:, 1:].reshape(2, 2, TRIES // 2, -1).swapaxes(0, 1).reshape(2, TRIES, -1)
    shares = beta(np.where(cut, augment.cutmix, augment.mixup), tries)
    boxes = np.where(cut[:, None], boxes_of(shares, middle_y, middle_x), 0.0)
    top, left, bottom, right = edges(boxes, side).T
    pasted = (bottom - top) * (right - left) / side**2
    return MixPlan(distance, cut, np.where(cut, 1 - pasted, shares).astype(np.float32), boxes)


def beta(a: NDArray[np.float64], numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Beta(a, a) by the method of Johnk (1964), exact for every ``a`` [P] in (0, 1] but for its tries being finite.

    ``numbers`` [2, T, P]: uniforms u, v of T tries. The first with u^(1/a) + v^(1/a) <= 1 gives u^(1/a) / (u^(1/a) +
    v^(1/a)); a row without one gets 1/2. In logarithms, since u^(1/a) underflows for a small ``a``.
    """
    u, v = np.log(numbers + 2.0**-33)  # multiples of 2^-32 from 0 on: half a step keeps off the 0
    with np.errstate(over="ignore"):
        larger, difference = np.maximum(u, v) / a, (v - u) / a
    good = larger + np.log1p(np.exp(-np.minimum(np.abs(difference), 700.0))) <= 0
    chosen = np.take_along_axis(difference, good.argmax(0)[None], 0)[0]
    return np.where(good.any(0), 1 / (1 + np.exp(np.clip(chosen, -700.0, 700.0))), 0.5)


def boxes_of(
    shares: NDArray[np.float64], middle_y: NDArray[np.float64], middle_x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Boxes [P, 4] (top, left, bottom, right) of area 1 - ``shares`` and the crop's aspect ratio around uniformly
    random middles, clipped to the crop; as shares of its side."""
    half = np.sqrt(1 - shares) / 2
    box = np.stack((middle_y - half, middle_x - half, middle_y + half, middle_x + half), 1)
    return np.clip(box, 0.0, 1.0)


def edges(boxes: NDArray[np.float64], side: int) -> NDArray[np.int64]:
    """``boxes`` [P, 4] in whole pixels of a crop of ``side``."""
    return np.rint(boxes * side).astype(np.int64)
