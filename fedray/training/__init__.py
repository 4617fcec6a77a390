"""Local training: engines, the training loop, client batches, process memory.

Uses: adapters, aggregation, config, data, evaluation, models.
"""
