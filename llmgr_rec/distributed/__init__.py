"""The only place that knows of ranks: process group, sharding, distributed ranking, export of sharded weights."""
