"""Makes interactions.parquet and items.parquet: synthetic data and converters of public dumps (docs/data.md)."""
