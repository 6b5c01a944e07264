"""Experiments: variants of a model, trained with several seeds and compared by paired tests over sessions."""
