"""Distributed execution: process group, collectives, sharding of embedding tables, FSDP, and sharded ranking."""
