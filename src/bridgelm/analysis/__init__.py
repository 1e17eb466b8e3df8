"""Statistics over runs: intervals, paired tests, and comparisons at equal rollouts or FLOPs."""
