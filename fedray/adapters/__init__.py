"""Adapters: named groups of parameters in a frozen model, each one flat vector; the adapter kinds.

May import config, aggregation, models, data and evaluation.
"""
