"""Everything that runs on Ray: driver, client actors, silos, pool, messages, cluster.

Uses: config, data, experiment, federation, methods, planning, storage, training.
"""
