"""Evaluation: protocol, ranking metrics, and results as tables, plots and the report."""
