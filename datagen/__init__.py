"""Writes interactions.parquet and items.parquet: synthetic data, and converters (docs/data.md)."""

from llmgr_rec.interruption import report_interrupts_of_imports

report_interrupts_of_imports()
