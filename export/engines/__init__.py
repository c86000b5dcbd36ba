"""Engines: an ONNX file made ready to run, by ONNX Runtime or by TensorRT. Cheap to import; the backends load on first use."""
