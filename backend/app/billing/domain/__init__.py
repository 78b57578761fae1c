"""The pure core: facts, catalog and decision; no clock, no randomness, no I/O."""
