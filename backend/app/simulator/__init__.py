"""A Stripe of our own: real-shaped objects and signed events for the demo, the tests and load runs."""
