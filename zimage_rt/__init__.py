"""Serve Z-Image without PyTorch."""
