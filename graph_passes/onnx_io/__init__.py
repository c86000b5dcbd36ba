"""ONNX files and graphs: read, written, converted; large weights stay in their files."""
