"""The list of graph passes, and what each reports."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from patchslim.choices import Layout
from patchslim.plan import SlimPlan

#: How rows are taken: see ``graph_passes.cutting.token_cutter.take_rows``.
CutForm = Literal["auto", "slice", "gather", "matmul"]
#: What images come as: float32 and normalised outside, or bytes in one of two orders.
ImageForm = Literal["float", "uint8-nchw", "uint8-nhwc"]


@dataclass(frozen=True)
class Refusal:
    """A place that a pass did not change, and why; ``site`` names the node or block."""

    site: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What one pass did: whether it changed the graph, at how many sites, and which sites it refused."""

    name: str
    modified: bool
    sites: int
    refused: list[Refusal] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """The result as plain values, for a report."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """What the passes are told: the plan (None for passes that need none), the layout of cut blocks, the form of a cut.

    ``image``, ``mean`` and ``std`` are for ``image_input``: what the graph is to take, and how pixels in [0, 1] are normalised.
    """

    plan: SlimPlan | None = None
    layout: Layout = "split"
    cut: CutForm = "auto"
    image: ImageForm = "float"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def require_plan(self) -> SlimPlan:
        """The plan; raises ``ValueError`` when there is none."""
        if self.plan is None:
            raise ValueError("this pass needs a SlimPlan")
        return self.plan


# A pass takes the graph (an onnx_graphsurgeon.Graph) and changes it in place; it returns the number of sites it changed. It
# raises match.MatchFailure when it does not understand the graph, and the manager then restores the graph as it was.
Run = Callable[[Any, Settings], int]


@dataclass(frozen=True)
class GraphPass:
    """A registered pass: its name, its explanation (the module's docstring) and the function that does it.

    ``default``: whether ``slim`` runs it unless passes are chosen by name. ``needs_plan``: whether it asks the settings for a
    plan. ``repeat``: whether it is run again on what it changed, with shapes inferred anew, until it changes nothing.
    """

    name: str
    explanation: str
    run: Run
    default: bool = True
    needs_plan: bool = False
    repeat: bool = False

    @property
    def summary(self) -> str:
        """First line of the explanation."""
        return self.explanation.splitlines()[0]


PASSES: dict[str, GraphPass] = {}


def graph_pass(name: str, *, default: bool = True, needs_plan: bool = False, repeat: bool = False) -> Callable[[Run], Run]:
    """Register the decorated function as the pass ``name``; its module's docstring explains it."""

    def register(run: Run) -> Run:
        explanation = inspect.getdoc(inspect.getmodule(run)) or name
        PASSES[name] = GraphPass(name, explanation, run, default, needs_plan, repeat)
        return run

    return register
