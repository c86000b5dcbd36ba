"""How each family of timm's Vision Transformers is read; an unknown one is refused by name, a known misfit with the reason.

A new family is one entry: ``@family(ItsClass)`` over a function that gives its embedding and rotary tables.
"""

from slimming.families.attention import View
from slimming.families.blocks import BlockReader, Stage
from slimming.families.heads import HeadReader
from slimming.families.models import ModelReader, check_supported, reader_of

__all__ = ["BlockReader", "HeadReader", "ModelReader", "Stage", "View", "check_supported", "reader_of"]
