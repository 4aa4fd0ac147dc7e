"""Runs of chains: which examples a step sees, what is measured, what is written."""
