"""Words that programs write for a missing value in text."""

MISSING_VALUES = ("nan", "NaN", "-nan", "NULL", "null", "None", r"\N", "NaT", "<NA>", "N/A", "#N/A")
