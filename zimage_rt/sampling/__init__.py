"""Noise levels, samplers, guidance and noise: what the loop is given."""
