"""Short programs that show how the parts of llmgr_rec fit together; see the docstring of each."""
