"""`python -m softlabels`: the same as the `softlabels` command."""

from softlabels.cli import run

run()
