"""Extraction rules, one per file: which answer a generated text gives, as published evaluations read it.

`fedray.evaluation.extraction_rule.EXTRACTION_RULES` finds a module by its name and takes its `ENTRY`.

Uses: evaluation.
"""
