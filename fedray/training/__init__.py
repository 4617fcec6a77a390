"""Local training: engines, the training loop, client batches, process memory.

Uses: adapters, config, data, evaluation, models.
"""
