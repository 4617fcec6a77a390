"""One file per method: `fedray.methods.registry` finds a module by its name and takes its `ENTRY`.

Besides the methods, `protocol` says what a method is, `registry` builds one from a configuration, and `parts` holds
what several methods share. May import training, adapters, evaluation, aggregation, models, data and config.
"""
