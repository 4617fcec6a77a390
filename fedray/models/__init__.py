"""Backbones and tokenizers: from a hub id, a local folder, an installed package, or random weights.

Uses: config.
"""
