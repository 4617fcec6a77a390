"""From a data source to one shard of tokenised examples per client.

Uses: config, models.
"""
