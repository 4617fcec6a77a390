"""All that is Ray: driver, client actors, silos, the pool, messages, the cluster."""
