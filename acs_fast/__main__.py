"""`python -m acs_fast`, which torchrun can start: the command line."""

import sys

from acs_fast.cli import main

sys.exit(main())
