"""Pipelines: whole runs from a configuration, each a short composition of the other rooms, no algorithm inside."""
