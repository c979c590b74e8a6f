"""What a server did: counters, metrics, traces, and what is made of them."""
