"""Results: the result of a run read from its folder, methods compared, statistics, tables, progress on the console.

Uses: adapters, config, data, evaluation, federation, planning, storage.
"""
