"""Benchmark suites: their items, prompts and scores, contamination, and lm-evaluation-harness."""
