"""The source tree: `app` is the product, `tests` proves it."""
