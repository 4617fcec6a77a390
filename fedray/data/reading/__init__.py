"""From a file to raw rows, and from a row's values to texts and class names.

Uses: config.
"""
