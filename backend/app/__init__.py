"""Tollkeeper: signed Stripe webhooks in, provable entitlements out."""
