"""Tests, one sentence of behaviour each."""
