"""What a checkpoint's files say: its configuration, weights by name, classes, pooling layers and parts.

Uses: config, models.
"""
