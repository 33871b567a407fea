"""Upscale models of the ESRGAN type, from their files to images, on ONNX Runtime."""
