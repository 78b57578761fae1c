"""Payments in, entitlements out; read the modules in the order of the data's way (see docs/architecture.md)."""
