"""Interrupts every command at random moments, and compares what it leaves with an uninterrupted run."""
