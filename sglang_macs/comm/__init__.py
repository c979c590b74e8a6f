"""Memory that the ranks of a host share, and the all-reduce over it."""
