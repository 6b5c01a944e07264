"""Benchmarks: each runs both sides of a comparison alternately in one process tree and writes what it saw as JSON."""
