"""The benchmark: Tollkeeper beside a textbook webhook handler, as ratios measured in one run."""
