"""Measures whether a system's pictures show what their prompts say."""
