"""Experiments: matrices of training runs, each judged session by session and compared in pairs."""
