"""The graph passes by name, what they are told, and what each reports."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from patchslim.choices import Layout
from patchslim.plan import SlimPlan

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

#: The operators that take rows: see ``graph_passes.cutting.row_ops.take_rows``.
CutForm = Literal["auto", "slice", "gather", "matmul"]
#: How dropped rows are added to kept ones: a matrix times them, or each sum by itself; see ``graph_passes.cutting.row_ops``.
MergeForm = Literal["matrix", "sum"]
#: What images come as: float32 and normalised outside; bytes in one of two orders; or float32 from 0 to 255.
ImageForm = Literal["float", "uint8-nchw", "uint8-nhwc", "float-nchw-255"]


@dataclass(frozen=True)
class Refusal:
    """A place that a pass did not change: ``site`` names the node, block or part of the graph, ``reason`` says why."""

    site: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What one pass did: whether it changed the graph, at how many sites, and what it refused."""

    name: str
    modified: bool
    sites: int
    refused: list[Refusal] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """The result as plain values, for a report."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """What the passes are told.

    ``plan``: the tokens that each block keeps; None for passes that need no plan. ``layout``: whether cut blocks get a query
    projection of their own. ``cut``: the operators that take rows. ``image``, ``mean`` and ``std`` are for ``image_input``: the
    images that the graph is to take, and mean and standard deviation of each channel for pixels in [0, 1].
    """

    plan: SlimPlan | None = None
    layout: Layout = "split"
    cut: CutForm = "auto"
    image: ImageForm = "float"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def require_plan(self) -> SlimPlan:
        """The plan. Raises ``ValueError`` where there is none."""
        if self.plan is None:
            raise ValueError("this pass needs a SlimPlan")
        return self.plan


#: A pass changes the graph in place and returns the number of sites that it changed. Where it does not understand the graph it
#: raises ``MatchFailure``, and the manager puts the graph back as it was.
PassFunction = Callable[["gs.Graph", Settings], int]


@dataclass(frozen=True)
class GraphPass:
    """A registered pass: its name, its explanation (the module's docstring) and its function.

    ``default``: whether ``slim`` runs it unless passes are chosen by name. ``needs_plan``: whether it asks the settings for the
    plan. ``repeat``: whether it is run again on what it changed, with shapes inferred anew, until it changes nothing.
    """

    name: str
    explanation: str
    run: PassFunction
    default: bool = True
    needs_plan: bool = False
    repeat: bool = False

    @property
    def summary(self) -> str:
        """The first line of the explanation."""
        return self.explanation.splitlines()[0]


#: Every pass, in the order in which they run.
PASSES: dict[str, GraphPass] = {}


def graph_pass(
    name: str, *, default: bool = True, needs_plan: bool = False, repeat: bool = False, after: Sequence[str] = ()
) -> Callable[[PassFunction], PassFunction]:
    """Register the decorated function as the pass ``name``, which its module's docstring explains.

    ``after``: passes that must come before this one in ``PASSES``. Raises ``ValueError`` where one of them is not there yet, or
    the name is taken.
    """
    if name in PASSES:
        raise ValueError(f"pass {name}: there is one of this name already")
    if missing := [other for other in after if other not in PASSES]:
        raise ValueError(f"pass {name} comes after {', '.join(missing)}: import it there in graph_passes/passes/__init__.py")

    def register(run: PassFunction) -> PassFunction:
        explanation = inspect.getdoc(inspect.getmodule(run)) or name
        PASSES[name] = GraphPass(name, explanation, run, default, needs_plan, repeat)
        return run

    return register
