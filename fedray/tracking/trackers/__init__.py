"""The built-in trackers, one file each.

Uses: config.
"""
