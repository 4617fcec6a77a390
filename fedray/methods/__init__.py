"""One file per method; `fedray.methods.registry` finds them by name."""
