"""Compares exported modules with diffusers' and transformers' own models."""
