"""Benchmarks of speed and quality, and the systems that they compare."""
