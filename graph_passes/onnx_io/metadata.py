"""Keys of an ONNX model's metadata that say what its images are.

``Image.NominalPixelRange`` and its values are ONNX's own (docs/MetadataProps.md of the ONNX repository).
"""

from __future__ import annotations

#: How far the values of a pixel reach, as the graph takes them.
PIXEL_RANGE = "Image.NominalPixelRange"
#: From 0 to 255, normalised in the graph.
FULL_RANGE = "NominalRange_0_255"
#: What is to be done to pixels outside of the graph; not there where the graph normalises them.
NORMALIZATION = "normalization"
