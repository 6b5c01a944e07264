"""Judging models: metrics, baselines, protocol, results as tables and plots."""
