"""Partitioners, one module each: which client gets which examples. The module's name is the `kind`, its `ENTRY` the
class. May import from `fedray.data` and the packages below it."""
