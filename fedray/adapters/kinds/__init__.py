"""The adapter kinds, one per file: what `adapter` of a method names.

`fedray.adapters.kind` finds a module by its name.

Uses: adapters, config.
"""
