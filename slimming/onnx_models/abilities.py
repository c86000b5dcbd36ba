"""What a plan for an ONNX file cannot ask for. Free of torch, so that options are refused before anything is loaded."""

from __future__ import annotations

from typing import Final

from slimming.models.abilities import Refusals

_BY_PYTORCH = "changes weights by PyTorch, and --onnx has no PyTorch model: leave it out"
GRAPH_REFUSALS: Final[Refusals] = {
    "closed-form": "an ONNX file has no PyTorch weights to refit",
    "sgd": f"--fit sgd {_BY_PYTORCH}",
    "distill": f"--fit distill {_BY_PYTORCH}",
    "finetune": f"--finetune-epochs {_BY_PYTORCH}",
    "summary": f"--summary {_BY_PYTORCH}",
    "latency": (
        "--latency-reduction and --latency-budget-ms are solved on a latency table that export.run measures on its own export, "
        "and there is none for other graphs yet: pass --macs-reduction"
    ),
    "similarity": "--score similarity measures tokens in PyTorch, and --onnx has no PyTorch model: pass --score paper",
}
