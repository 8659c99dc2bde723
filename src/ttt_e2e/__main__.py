"""`python -m ttt_e2e`: the command line."""

from ttt_e2e.cli.process import run

run()
