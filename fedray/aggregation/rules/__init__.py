"""Aggregation rules, one per file.

`fedray.aggregation.rule.RULES` finds a module by its name and takes its `ENTRY`.

Uses: aggregation.
"""
