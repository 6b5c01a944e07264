"""Data sets on disk and their batches: schema, preparation, reader, session graphs, collation."""
