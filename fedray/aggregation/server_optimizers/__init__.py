"""Server optimizers, one per file.

`fedray.aggregation.server_optimizer.SERVER_OPTIMIZERS` finds a module by its name and takes its `ENTRY`.

Uses: aggregation.
"""
