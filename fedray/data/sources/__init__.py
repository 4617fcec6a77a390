"""Data sources, one module each: where examples come from. The module's name is the `source`, its `ENTRY` the class.
May import from `fedray.data` and the packages below it."""
