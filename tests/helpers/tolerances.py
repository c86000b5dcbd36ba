"""Tolerances that follow from the arithmetic: the type's precision, the number of terms, the condition of what is solved.

A sum of n rounded products is off by at most ``n u`` of the sum of their magnitudes, and by about ``sqrt(n) u`` when the
roundings are independent (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; Higham and Mary 2019). In which
order a processor adds changes the error within that bound, never the bound.
"""

from __future__ import annotations

import math

import torch

#: How many standard deviations of the rounding errors are allowed: one comparison looks at thousands of numbers.
DEVIATIONS = 8.0


def sum_error(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Error of a sum of ``terms`` products, relative to the sum of their magnitudes."""
    return DEVIATIONS * math.sqrt(terms) * torch.finfo(dtype).eps / 2


def solve_error(condition: float, terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Error of what linear equations give, relative to its largest entry; their coefficients are sums of ``terms`` products.

    ``condition`` is that of the equations' matrix (2-norm); first order in the coefficients' error (Higham, theorem 7.2).
    """
    return condition * sum_error(terms, dtype)
