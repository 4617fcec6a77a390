"""From a configuration to results: preparation, calibration, the methods one after another, the run folder, its rows.

Uses: config, data, evaluation, federation, methods, models, planning, results, storage, training.
"""
