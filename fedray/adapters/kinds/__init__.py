"""The adapter kinds, one per file: what `adapter` of a method names (`fedray.adapters.kind`)."""
