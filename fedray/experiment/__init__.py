"""From a configuration to results: preparation, calibration, each method in turn, the run folder, its rows.

Uses: config, data, evaluation, federation, methods, models, planning, report, results, storage, training.
"""
