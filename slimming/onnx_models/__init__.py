"""Plans for Vision Transformers that exist as ONNX files only: a graph read as embedding, blocks and head in ONNX Runtime.

The one part of ``slimming`` that knows ``graph_passes``, which finds the blocks. The search is the one for PyTorch models.
"""
