"""What each backend needs beyond the ONNX graphs; one file per backend."""
