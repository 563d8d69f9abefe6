"""Measurements, not tests: `python -m tests.benchmarks.boot` and `.store`, with the extra `bench` installed."""
