"""The way of a delivery: verify, parse, mask."""
