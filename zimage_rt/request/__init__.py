"""Requests: their fields, the codec of texts and JSON, and the check against a bundle."""
