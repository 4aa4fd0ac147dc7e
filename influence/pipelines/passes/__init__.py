"""Passes over a dataset: shards, resumable, on any number of ranks."""
