"""The engines' configurations, one per file: what `engine` of a tier names (`fedray.config.engine`)."""
