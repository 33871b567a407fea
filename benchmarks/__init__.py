"""Measures of speed and quality, and the systems that they measure."""
