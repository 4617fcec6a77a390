"""From a data source to one shard of tokenised examples per client. May import from `fedray.models`,
`fedray.aggregation`, `fedray.config` and the modules at the top."""
