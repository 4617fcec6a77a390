"""One file per aggregation rule: `fedray.aggregation.rule.RULES` finds a module by its name and takes its `ENTRY`."""
