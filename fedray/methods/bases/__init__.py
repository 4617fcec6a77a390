"""Base classes of methods.

`shared_adapter` is for methods with one adapter for all clients. Derived from it are `carried_adapter`, whose server
carries a sum along, `combined_factors`, whose server combines LoRA factors, and `personal_branch`, whose clients keep a
second LoRA.

No module here is a method.

Uses: adapters, aggregation, config, methods.
"""
