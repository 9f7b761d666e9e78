"""Plan once a forward, run once a layer."""
