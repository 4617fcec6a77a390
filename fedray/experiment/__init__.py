"""From a configuration to results: preparation, calibration, each method in turn, the run folder, its rows,
models restored from it.

Uses: adapters, config, data, evaluation, federation, methods, models, planning, report, results, storage, tracking,
training.
"""
