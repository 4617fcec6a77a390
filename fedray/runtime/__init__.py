"""Everything that runs on Ray: driver, client actors, silos, pool, messages, cluster.

Uses: adapters, config, data, experiment, federation, methods, planning, storage, training.
"""
