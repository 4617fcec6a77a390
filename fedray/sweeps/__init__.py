"""Many experiments on one cluster, as trials of Ray Tune: the space, the trials, what they share, the result.

Uses: config, data, evaluation, experiment, federation, methods, models, planning, report, results, runtime, storage.
"""
