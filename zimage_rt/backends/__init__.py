"""Backends, which run a bundle's modules: one file per backend. This module imports no backend's library."""
