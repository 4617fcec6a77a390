"""What an experiment costs before it runs: parameters, bytes, memory, placement on a cluster.

Uses: adapters, config, federation, methods, models, storage, training.
"""
