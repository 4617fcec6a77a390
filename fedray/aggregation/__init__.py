"""Aggregation rules: pure functions on numpy arrays, float32 in and out, float64 inside."""
