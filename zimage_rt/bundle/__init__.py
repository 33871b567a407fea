"""A bundle's folder: its manifest, its files, its tokenizer, and the readers of JSON, safetensors and ONNX."""
