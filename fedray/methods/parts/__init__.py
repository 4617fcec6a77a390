"""What several methods share: heads, partial capacity, LoRA factors, number types on the wire, leave-one-out
aggregates. No module here is a method.
"""
