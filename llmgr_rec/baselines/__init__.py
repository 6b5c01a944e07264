"""Recommenders without training, their blend with a model's scores and the kNN smoothing of cold items.

Nothing in here knows of ranks.
"""
