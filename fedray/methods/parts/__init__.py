"""What methods share: heads, partial capacity, LoRA factors, carried sums, number types on the wire, leave-one-out
aggregates.

No module here is a method.

Uses: adapters, aggregation, config, methods.
"""
