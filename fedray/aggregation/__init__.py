"""Aggregation: pure functions on numpy arrays (float32 in and out, float64 inside), and the rules that name them.

Uses: config.
"""
