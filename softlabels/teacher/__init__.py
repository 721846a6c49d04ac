"""Run a teacher once and write what it says."""
