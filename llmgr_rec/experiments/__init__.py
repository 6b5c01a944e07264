"""Experiments: variants of a model trained with several seeds, evaluated session by session and compared in pairs."""
