"""Pictures and pages from tables and runs."""
