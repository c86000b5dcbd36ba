"""What each axis of a tensor holds: images, features, pixels, or tokens, and then which tokens in which order.

An axis is a tuple of factors, outermost first: ``(Batch, 3)`` is an axis where a batch and three heads were merged. However an
exporter's Reshapes and Transposes shuffle the axes, factors can be followed through them, and the tokens keep their names. A
token's name is the number of its patch, row by row, or a negative number for a prefix token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from graph_passes.analysis.patterns import MatchFailure

#: Stands for a batch size that is not known: a prime, so that it never divides a number of features or tokens.
UNKNOWN_BATCH = 1_000_003
#: The most tokens that a plan may have.
MAX_TOKENS = 1_000_000


@dataclass(frozen=True)
class Batch:
    """Images, one behind the other."""

    size: int = UNKNOWN_BATCH


@dataclass(frozen=True)
class Pixels:
    """Pixels of an image: its rows (``axis`` 0) or columns (1)."""

    axis: int
    size: int


@dataclass(frozen=True)
class Grid:
    """Patches of an image: the rows (``axis`` 0) or columns (1) of their grid; rows merged with columns are tokens."""

    axis: int
    size: int


@dataclass(frozen=True)
class Tokens:
    """Tokens by name, in order. ``keys``: the keys of an attention, on the last axis of its scores."""

    names: tuple[int, ...]
    keys: bool = False

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.names)


@dataclass(frozen=True)
class Mixed:
    """Sums of tokens by a constant matrix, to be added to as many kept tokens; see ``cutting.token_merging``."""

    size: int


@dataclass(frozen=True)
class Gathered:
    """Sums of tokens to come, whose terms lie on the next axis; see ``cutting.row_ops.sum_rows``."""

    size: int


Factor = Batch | Pixels | Grid | Tokens | Mixed | Gathered | int
Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]


def axis_size(axis: Axis) -> int:
    """The length of an axis, where an unknown batch counts ``UNKNOWN_BATCH``."""
    return prod(factor if isinstance(factor, int) else factor.size for factor in axis)


def has(axis: Axis, *kinds: type) -> bool:
    """Whether a factor of the axis is of one of the kinds."""
    return any(isinstance(factor, kinds) for factor in axis)


def is_spatial(axis: Axis) -> bool:
    """Whether the axis tells places of the image apart: pixels, patches or tokens."""
    return has(axis, Pixels, Grid, Tokens, Mixed, Gathered)


def tokens_of(axis: Axis) -> Tokens | None:
    """The tokens of an axis that holds tokens alone; None for any other axis."""
    return axis[0] if len(axis) == 1 and isinstance(axis[0], Tokens) else None


def token_axis(axes: Axes, *, keys: bool = False) -> int | None:
    """The index of the axis that holds tokens alone (with ``keys``, the keys of an attention); None where there is none."""
    for index, axis in enumerate(axes):
        tokens = tokens_of(axis)
        if tokens is not None and tokens.keys == keys:
            return index
    return None


def tokens_in(axes: Axes) -> Tokens | None:
    """The tokens of a tensor, keys aside, on whatever axis and merged with others or not; None where it has none."""
    found = [factor for axis in axes for factor in axis if isinstance(factor, Tokens) and not factor.keys]
    return found[0] if found else None


def regrouped(axes: Axes, shape: Sequence[int], site: str) -> Axes:
    """The axes after a Reshape to ``shape``, in which -1 is a length to be inferred.

    Features may be divided anywhere, pixels into a grid of patches. Raises ``MatchFailure`` where the number of elements
    changes, or images or tokens would be divided.
    """
    flat = [factor for axis in axes for factor in axis]
    known = prod(length for length in shape if length >= 0)
    total = axis_size(tuple(flat))
    if any(length == 0 for length in shape) or not known or total % known or (-1 not in shape and total != known):
        raise MatchFailure(site, f"expected a Reshape of {total} elements to {list(shape)}")
    lengths = [total // known if length < 0 else length for length in shape]
    result: list[Axis] = []
    for place, length in enumerate(lengths):
        taken: list[Factor] = []
        missing = length
        while missing > 1 or (flat and _is_named_one(flat[0]) and _belongs_here(taken, length, lengths[place + 1 :])):
            if not flat:
                raise MatchFailure(site, f"expected a Reshape of {total} elements to {list(shape)}")
            factor = flat.pop(0)
            size = axis_size((factor,))
            if missing % size == 0:
                taken.append(factor)
                missing //= size
            elif size % missing == 0 and isinstance(factor, int | Pixels):
                taken.append(missing if isinstance(factor, int) else Grid(factor.axis, missing))
                flat.insert(0, size // missing)
                missing = 1
            else:
                raise MatchFailure(site, f"expected a Reshape that keeps {_named(factor)} together; it makes {list(shape)}")
        result.append(canonical(taken))
    return tuple(result)


def _is_named_one(factor: Factor) -> bool:
    return not isinstance(factor, int) and factor.size == 1


def _belongs_here(taken: list[Factor], length: int, later: Sequence[int]) -> bool:
    """Whether a batch or token axis of length 1 goes into the axis being filled: into one of length 1 if there is one."""
    return (length == 1 and not taken) or (1 not in later)


def canonical(factors: Sequence[Factor]) -> Axis:
    """An axis of ``factors`` in the one form that equal axes have.

    Neighbouring features are merged, rows and columns of patches become tokens, and a batch of one image beside anything else
    is left out. Raises ``MatchFailure`` for more than ``MAX_TOKENS`` patches.
    """
    factors = [factor for factor in factors if factor != 1]
    result: list[Factor] = []
    for factor in factors:
        last = result[-1] if result else None
        if factor == Batch(1) and len(factors) > 1:
            continue
        if isinstance(factor, int) and isinstance(last, int):
            result[-1] = last * factor
        elif isinstance(factor, Grid) and isinstance(last, Grid) and (last.axis, factor.axis) == (0, 1):
            if last.size * factor.size > MAX_TOKENS:
                raise MatchFailure("patch grid", f"expected at most {MAX_TOKENS} patches; found {last.size} x {factor.size}")
            result[-1] = Tokens(tuple(range(last.size * factor.size)))
        else:
            result.append(factor)
    return tuple(result)


def broadcast(operands: Sequence[Axes], site: str) -> Axes:
    """The axes of what an elementwise node makes of its operands; they are aligned at the last axis, as in NumPy.

    Raises ``MatchFailure`` where two operands hold different things on one axis.
    """
    rank = max(len(axes) for axes in operands)
    result: list[Axis] = []
    for place in range(rank):
        merged: Axis = ()
        for axes in operands:
            index = place - rank + len(axes)
            axis = axes[index] if index >= 0 else ()
            if axis_size(axis) == 1 and not has(axis, Tokens):
                merged = merged or axis
            elif axis_size(merged) == 1 and not has(merged, Tokens):
                merged = axis
            elif merged != axis:
                raise MatchFailure(site, f"expected operands that agree; one has {described(merged)}, one {described(axis)}")
        result.append(merged)
    return tuple(result)


def described(axis: Axis) -> str:
    """An axis in words, for messages: "images x 3 features"."""
    return " x ".join(_named(factor) for factor in axis) or "1"


def _named(factor: Factor) -> str:
    if isinstance(factor, int):
        return f"{factor} features"
    if isinstance(factor, Batch):
        return "images"
    if isinstance(factor, Tokens | Mixed | Gathered):
        kind = {Mixed: "mixed tokens", Gathered: "sums of tokens"}.get(type(factor), "tokens")
        return f"{factor.size} {kind}"
    return f"{factor.size} {'rows' if factor.axis == 0 else 'columns'} of the {type(factor).__name__.lower()}"
