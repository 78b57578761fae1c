"""The first five minutes: a real service, a stream of signed events, and an account of what came of them."""
