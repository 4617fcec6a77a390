"""Models taken home: folders that peft, pyreft and transformers open, a loader for what they cannot express, a model
card; and clients that arrive after the run.

Uses: adapters, config, experiment, models, results, storage, training.
"""
