"""How time grows with size, measured so that other work on the machine does not decide a test."""

import time
from collections.abc import Callable
from math import log

ALMOST_LINEAR = 1.5  # n log n and the caches of a machine stay below 1.25, n ** 2 with them above 1.9


def slope_of(work: Callable[[int], object], small: int, large: int, enough: float = ALMOST_LINEAR) -> float:
    """Slope of log time over log size between two sizes.

    Counts the processor's time and takes the shortest of several runs of each size, for other work can only add to it;
    the sizes take turns, so that a slow minute meets both. Up to eight rounds are run, until the slope is
    below `enough`: time that really grows faster does so in the shortest runs too.
    """
    assert large >= 8 * small, "sizes closer together cannot tell an unlucky run from quadratic time"
    seconds = {small: float("inf"), large: float("inf")}
    slope = float("inf")
    for _ in range(8):
        for size in (small, large):
            start = time.process_time()
            work(size)
            seconds[size] = min(seconds[size], time.process_time() - start)
        slope = log(seconds[large] / seconds[small]) / log(large / small)
        if slope < enough:
            break
    return slope
