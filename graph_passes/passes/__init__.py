"""The graph passes, one file each. Importing this package registers them in the order in which they run."""

from graph_passes.passes import fold_constants as fold_constants  # isort: skip
from graph_passes.passes import expand_attention as expand_attention  # isort: skip
from graph_passes.passes import find_blocks as find_blocks  # isort: skip
from graph_passes.passes import repair_reshapes as repair_reshapes  # isort: skip
from graph_passes.passes import fold_scale as fold_scale  # isort: skip
from graph_passes.passes import image_input as image_input  # isort: skip
from graph_passes.passes import drop_patches as drop_patches  # isort: skip
from graph_passes.passes import order_tokens as order_tokens  # isort: skip
from graph_passes.passes import split_qkv as split_qkv  # isort: skip
from graph_passes.passes import cut_tokens as cut_tokens  # isort: skip
from graph_passes.passes import cut_last_block as cut_last_block  # isort: skip
from graph_passes.passes import elide_identities as elide_identities  # isort: skip
from graph_passes.passes import to_fp16 as to_fp16  # isort: skip
