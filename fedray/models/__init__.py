"""Backbones and tokenizers: hub id, local folder, installed package, or random weights."""
