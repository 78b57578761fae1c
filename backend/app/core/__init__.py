"""Foundations that know no business word: settings, clock, errors, database, idempotency."""
