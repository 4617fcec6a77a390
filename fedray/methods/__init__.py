"""The federated methods, one per file, and what a method is.

`registry` finds a module by its name, takes its `ENTRY`, and builds the method from a configuration. `protocol` says
what a method is, `bases` has classes that methods are derived from, and `parts` functions that several methods share.

Uses: adapters, aggregation, config, training.
"""
