"""Formats of instruction data, one per file: what a row's columns say.

Uses: data.
"""
