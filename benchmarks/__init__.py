"""Benchmarks: every claim about speed or memory is one command here, run against the strongest baseline we can write."""
