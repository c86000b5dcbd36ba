"""The graph passes, one file each. Importing this package registers them in the order in which they run.

Where a pass says in its decorator that it comes after others, registering it before them is an error.
"""

# Every other pass reads shapes and tables as constants; exporters leave them to be computed at run time.
from graph_passes.passes import fold_constants as fold_constants  # isort: skip

# One form of attention from here on, with scores and a Softmax that scales and merged tokens can go into.
from graph_passes.passes import expand_attention as expand_attention  # isort: skip

# Says whether the graph is understood, before any pass that needs a plan has changed it.
from graph_passes.passes import find_blocks as find_blocks  # isort: skip

# Before all cuts: a shape that names the token count would be wrong behind them.
from graph_passes.passes import repair_reshapes as repair_reshapes  # isort: skip

# Before split_qkv: the scale goes into the projection as it was exported, and is split with it.
from graph_passes.passes import fold_scale as fold_scale  # isort: skip

# Before split_qkv and cut_tokens, which put rows between a norm and the projections that read it.
from graph_passes.passes import fold_norm as fold_norm  # isort: skip

# Before drop_patches, which leaves no convolution whose weights could take the normalisation.
from graph_passes.passes import image_input as image_input  # isort: skip

# Before order_tokens: it puts the patches that it keeps in the plan's order itself, which spares a Gather.
from graph_passes.passes import drop_patches as drop_patches  # isort: skip

# Before cut_tokens, whose cuts are then one Slice each.
from graph_passes.passes import order_tokens as order_tokens  # isort: skip

# Before cut_tokens, which then takes the kept rows before the projection of the queries.
from graph_passes.passes import split_qkv as split_qkv  # isort: skip
from graph_passes.passes import cut_tokens as cut_tokens  # isort: skip

# Behind cut_tokens: where there is a plan, it has cut the last block already, and nothing is left to do.
from graph_passes.passes import cut_last_block as cut_last_block  # isort: skip

# Behind split_qkv, which unpacks its projections as they were unpacked; may leave Transposes that move nothing.
from graph_passes.passes import drop_unit_axes as drop_unit_axes  # isort: skip

# Behind all that leave nodes which change nothing any more.
from graph_passes.passes import elide_identities as elide_identities  # isort: skip

# Behind split_qkv, which gives keys and values a projection of their own, and once nothing idle is behind an attention.
from graph_passes.passes import fold_bias as fold_bias  # isort: skip

# Behind all that change weights: what earlier passes compute in float64 is rounded to float16 once.
from graph_passes.passes import to_fp16 as to_fp16  # isort: skip

# Behind to_fp16, so that probabilities are float32.
from graph_passes.passes import softmax_output as softmax_output  # isort: skip
