"""Paired tests of the difference of two variants, and their correction for several comparisons.

Shapes: S sessions.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def paired_p_value(values_S: NDArray[np.float64], reference_S: NDArray[np.float64]) -> float:
    """p-value of a two-sided paired t-test over sessions; 1 if the two are equal in all sessions.

    The t-test is the test that Urbano, Lima and Hanjalic (SIGIR 2019, arXiv 1905.11096) recommend for means of ranking
    metrics.

    Args:
        values_S: A metric of the sessions, averaged over seeds.
        reference_S: The same of the reference.
    """
    if len(values_S) < 2 or np.array_equal(values_S, reference_S):
        return 1.0
    return float(stats.ttest_rel(values_S, reference_S).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by the method of Holm (1979), which holds the error rate over all comparisons together.

    Args:
        p_values: p-values of the comparisons.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = largest
    return adjusted
