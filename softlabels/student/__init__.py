"""Stream a plan and train on it; no teacher, no database."""
