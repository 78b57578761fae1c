"""Real parts for tests and the benchmark: database and cache servers, and the service as its own process."""
