"""95 % confidence intervals of what is counted on images."""

from __future__ import annotations

import math

_Z95 = 1.959963984540054  # the standard normal's 97.5 % point, scipy.special.ndtri(0.975)
_FEWEST_POINTS = 1e-6  # of a gate that images can resolve at all


def drop_interval(lost: int, gained: int, images: int) -> tuple[float, float]:
    """95 % confidence interval of the top-1 drop in points, for the two models run on the same images.

    The adjusted Wald interval for matched pairs (Agresti and Min, Statistics in Medicine 24, 2005, pp. 729-740): half an
    observation is added to each of the four cells of the paired table, so with b = lost + 1/2, c = gained + 1/2 and
    N = images + 2 it is ``(b - c) / N +- z sqrt(b + c - (b - c)^2 / N) / N``. It keeps a width when no image changed sides.
    Neither scipy nor statsmodels has an interval of two paired proportions.
    """
    b, c, n = lost + 0.5, gained + 0.5, images + 2
    centre = (b - c) / n
    half = _Z95 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return max(-100.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def proportion_interval(count: int, images: int) -> tuple[float, float]:
    """95 % confidence interval in percent of ``count`` of ``images``: Wilson's score interval (JASA 22, 1927, pp. 209-212).

    Needs scipy.
    """
    from scipy.stats import binomtest

    low, high = binomtest(count, images).proportion_ci(method="wilson")
    return 100 * float(low), 100 * float(high)


def images_needed(lost: int, gained: int, images: int, points: float) -> int | None:
    """About how many images have a 95 % interval of no more than +- ``points``, if the models differ on as many of them.

    ``drop_interval`` solved for the number of images, rounded up to two digits; None for points that no number resolves.
    """
    if points < _FEWEST_POINTS:
        return None
    rate, a = (lost + gained) / images, (points / (100 * _Z95)) ** 2
    exact = max(100 / points, (rate + math.sqrt(rate**2 + 4 * a)) / (2 * a) - 2)
    unit: int = 10 ** max(0, math.floor(math.log10(exact)) - 1)
    return math.ceil(exact / unit) * unit
