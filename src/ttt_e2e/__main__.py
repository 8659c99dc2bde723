"""`python -m ttt_e2e`: the command line."""

import sys

from ttt_e2e.cli.main import main

sys.exit(main())
