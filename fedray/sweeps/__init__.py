"""Many experiments on one cluster, as trials of Ray Tune."""
