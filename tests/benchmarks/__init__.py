"""Measurements, not tests: `python -m tests.benchmarks.boot` with the extra `bench` installed."""
