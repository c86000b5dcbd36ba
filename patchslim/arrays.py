"""The one name for NumPy arrays of images, logits and tensors."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

#: Any NumPy array; functions say shapes and types in their docstrings.
Array = NDArray[Any]
