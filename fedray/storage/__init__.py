"""What a run keeps on disk: storage paths, states as bytes, files of client states, checkpoints, growing tables.

Uses: adapters, config.
"""
