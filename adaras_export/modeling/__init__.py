"""A stock model in memory: load, generate, capture activations, steer, gate."""
