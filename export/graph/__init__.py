"""ONNX graphs without weights: tracing, the cache of traced graphs, and rewriting."""
