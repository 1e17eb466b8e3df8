"""The numbers that an update is made of: advantages, schedules, per-token losses, importance weights."""
