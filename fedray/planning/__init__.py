"""What an experiment costs before it runs: parameters, bytes, memory, placement on a cluster."""
