"""What keeps the repository in step with itself; `make check` and `make fmt` run it."""
