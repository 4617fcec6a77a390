"""Partitioners, one per file: which client gets which examples.

The module's name is the `kind` in the configuration, and its `ENTRY` is the class.

Uses: config, data.
"""
