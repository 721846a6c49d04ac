"""Runnable recipes that put the parts of softlabels together."""
