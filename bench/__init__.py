"""The benchmark: Tollkeeper beside a textbook webhook handler, PostgreSQL itself and a bare prototype, in one run."""
