"""The command line: thin subcommands over the library.

Results go to stdout, progress and errors to stderr. Exit 0: done or already done; 1: a failure
that stays; 2: wrong use; 75: try again. Each command imports its part when it runs, so `--help`
is quick and a student's machine needs no database.
"""

from softlabels.cli.main import main, run

__all__ = ["main", "run"]
