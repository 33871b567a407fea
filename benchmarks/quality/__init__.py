"""Judges whether a system's images show what their prompts describe."""
