"""Trackers: what happens in a run, as TensorBoard, Weights & Biases, MLflow and users' own trackers show it.

Uses: config, evaluation, federation, report, results, storage.
"""
