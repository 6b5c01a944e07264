"""Files: pretrained models, table I/O, checkpoints and bundles."""
