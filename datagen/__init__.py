"""Writes interactions.parquet and items.parquet: synthetic data, and converters of public data sets (docs/data.md)."""
