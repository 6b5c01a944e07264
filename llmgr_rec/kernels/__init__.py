"""Self-contained tensor kernels, faster than the plain library calls; tests/kernels has a plain reference of each."""
