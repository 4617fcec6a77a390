"""The federated methods, one per file, and what a method is.

`registry` finds a module by its name, takes its `ENTRY`, and builds the method from a configuration. `protocol` says
what a method is, `shared_adapter` what methods with one adapter for all clients have in common (`carried_adapter` those
whose server carries a sum along, `combined_factors` those whose server combines LoRA factors), and `parts` holds what
several methods share.

Uses: adapters, aggregation, config, training.
"""
