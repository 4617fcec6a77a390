"""Adapters: named groups of parameters in a frozen model, each one flat vector; layouts, first values, client batches.

Uses: aggregation, config, models.
"""
