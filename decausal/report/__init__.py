"""One page over runs, evaluations and conversions, read from their files alone."""
