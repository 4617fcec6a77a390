"""Paths and URIs, states as bytes, client states, checkpoints, growing tables."""
