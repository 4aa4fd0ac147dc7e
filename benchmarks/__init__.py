"""Benchmarks: each claim about speed or memory is one command, run against the strongest baseline we can write."""
