"""How fast: slim against dense in ONNX Runtime, the graph passes, and the search for a plan."""
