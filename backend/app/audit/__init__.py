"""The append-only record of what was done, to whom and because of what."""
