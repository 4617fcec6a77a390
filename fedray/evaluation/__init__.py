"""Losses and metrics of a model on a table of examples.

Uses: config, data, models.
"""
