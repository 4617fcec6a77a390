"""Formats of instruction data, one per file: from a row's columns to a prompt and an answer, or to turns.

Uses: config, data.
"""
