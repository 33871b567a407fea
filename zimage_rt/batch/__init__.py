"""Batches: tables of requests whose images are written to a folder with a journal."""
