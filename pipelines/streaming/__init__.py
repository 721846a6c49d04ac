"""Streams of soft labels measured beside other loaders; `make bench-stream` runs it."""
