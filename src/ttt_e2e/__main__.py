"""`python -m ttt_e2e`: the command line."""

import sys

from ttt_e2e.cli import main

sys.exit(main())
