"""Data sources, one per file: where examples come from.

The module's name is the `source` in the configuration, and its `ENTRY` is the class.

Uses: config, data, models.
"""
