"""Vision Transformers as this project reads them: loaded, taken apart into embedding, blocks and head, run under a plan.

How each family of timm's is read is in ``reader``; an unknown one is refused by name, a known misfit with the reason.
"""
