"""Words that programs write for a missing value in text."""

MISSING_VALUES = ("nan", "NaN", "-nan", "NULL", "null", "None", r"\N", "NaT", "<NA>", "N/A", "#N/A")

SUSPECT_IDS = ("-", "?", "na", "n/a", "nan", "nil", "none", "null", "(null)", "undefined", "unknown", "anonymous")
"""Ids, in lower case, that programs write for users or items they do not know, but that may also be real names.

They are read as ids, with a warning, because otherwise all unknown users silently become one.
"""
