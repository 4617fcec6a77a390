"""The engines' configurations, one per file: what `engine` of a tier names.

`fedray.config.engine` finds a module by its name.

Uses: config, training.
"""
