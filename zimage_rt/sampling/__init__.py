"""Noise schedules, samplers, guidance scales and noise: the inputs of the sampler loop."""
