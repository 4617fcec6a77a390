"""Adapters: named parameter groups in a frozen model, each one flat vector; layouts, initial values, client batches.

Uses: aggregation, config, models.
"""
