"""WHEN blocks come: the schedule, the readers, the executor."""
