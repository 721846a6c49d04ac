"""Recorded teachers: log-probabilities that an engine, an API or a data set holds."""
