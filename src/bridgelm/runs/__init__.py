"""The run folder, written and read; the live display, the trackers, and the checks before a run."""
