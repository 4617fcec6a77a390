"""Local training: engines, the training loop, client batches, process memory.

May import config, aggregation, models, data, evaluation and adapters.
"""
