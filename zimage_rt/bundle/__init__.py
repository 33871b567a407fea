"""A bundle's folder: its manifest, files and tokenizer, and readers of JSON, safetensors and ONNX files."""
