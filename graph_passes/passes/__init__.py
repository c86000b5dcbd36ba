"""The graph passes, one file each. Importing this package registers them in the order in which they run."""

from graph_passes.passes import repair_reshapes as repair_reshapes  # isort: skip
from graph_passes.passes import fold_scale as fold_scale  # isort: skip
from graph_passes.passes import order_tokens as order_tokens  # isort: skip
from graph_passes.passes import cut_tokens as cut_tokens  # isort: skip
from graph_passes.passes import split_qkv as split_qkv  # isort: skip
from graph_passes.passes import to_fp16 as to_fp16  # isort: skip
