"""What methods are derived from.

`shared_adapter` is for those with one adapter for all clients, `carried_adapter` for those of them whose server carries
a sum along, `combined_factors` for those whose server combines LoRA factors, and `personal_branch` for those whose
clients keep a second LoRA.

No module here is a method.

Uses: adapters, aggregation, config, methods.
"""
