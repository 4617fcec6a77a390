"""Losses and metrics of a model on a table of examples.

May import data, models, aggregation and config.
"""
