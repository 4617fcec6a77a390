"""From a configuration to results: preparation, calibration, the methods one after another, the run folder, result rows.

Uses: config, data, evaluation, federation, methods, models, planning, results, storage, training.
"""
