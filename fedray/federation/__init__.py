"""A round without Ray: tasks and results, worker, work queue, participation, failures, update checks, local pool.

Uses: adapters, aggregation, config, data, evaluation, methods, models, storage, training.
"""
