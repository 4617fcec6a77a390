"""From a configuration to results: preparation, the methods one after another, the run folder and its rows."""
