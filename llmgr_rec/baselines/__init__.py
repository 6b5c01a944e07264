"""Non-neural baselines, their blend with the scores of a model, and kNN smoothing of cold items."""
