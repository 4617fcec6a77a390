"""What an experiment costs before it runs: parameters, bytes, memory, placement on a cluster.

Uses: adapters, aggregation, config, federation, methods, models, storage, training.
"""
