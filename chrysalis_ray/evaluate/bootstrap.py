"""Intervals over documents: the paired bootstrap (Efron 1979; for language, Koehn 2004), stratified by domain.

Documents, not tokens, are drawn: the tokens of one document rise and fall together. Every candidate is judged on the same
draws, so that a difference between two candidates is as sharp as their scores are correlated.

An end of an interval that is corrected for many comparisons lies far out, and needs draws that lie farther: with 2000 draws at
99.97 % it would be the very largest of them, whatever that came to be. As many are drawn as leave `BEYOND` outside of each end.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BLOCK = 4_000_000  # entries of the count matrix held at a time
BEYOND = 10  # draws outside of each end: what tail it really leaves is then known to about a third
MOST_DRAWS = 50_000


def draws_for(confidence: float, asked: int) -> int:
    """How many draws an interval of this confidence needs, `asked` at the least."""
    tail = (1.0 - confidence) / 2.0
    return max(asked, min(MOST_DRAWS, math.ceil(BEYOND / max(tail, BEYOND / MOST_DRAWS) - 1e-6)))


def resampled_losses(losses_CD: Floats, tokens_D: Floats, domains_D: NDArray[np.int64], samples: int, rng_seed: int) -> Floats:
    """Macro losses [samples, C] of C candidates under resampling: the mean over domains of `resampled_by_domain`."""
    return resampled_by_domain(losses_CD, tokens_D, domains_D, samples, rng_seed).mean(1)


def resampled_by_domain(
    losses_CD: Floats, tokens_D: Floats, domains_D: NDArray[np.int64], samples: int, rng_seed: int
) -> Floats:
    """Losses in nats per token [samples, domains, C] of C candidates under resampling.

    `losses_CD` are nats summed per document, `domains_D` numbers the domain of each document from 0. In each sample as many
    documents are drawn with replacement from each domain as it has.
    """
    rng = np.random.default_rng(rng_seed)
    domains = np.unique(domains_D)
    drawn_SDC = np.empty((samples, len(domains), len(losses_CD)))
    for place, domain in enumerate(domains):
        inside = domains_D == domain
        count = int(inside.sum())
        step = max(1, BLOCK // count)
        for start in range(0, samples, step):
            stop = min(start + step, samples)
            draws = rng.multinomial(count, np.full(count, 1.0 / count), size=stop - start).astype(np.float64)
            drawn_SDC[start:stop, place] = (draws @ losses_CD[:, inside].T) / (draws @ tokens_D[inside])[:, None]
    return drawn_SDC


def interval(values_S: Floats, confidence: float) -> tuple[float, float]:
    """The central percentile interval that holds a share `confidence` of the samples."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values_S, [tail, 1.0 - tail])
    return float(low), float(high)
