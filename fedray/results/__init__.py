"""Results: the result of a run read from its folder, tables, live progress on the console, statistics.

Uses: config, data, federation, planning, storage.
"""
