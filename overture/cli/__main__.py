"""`python -m overture.cli` is the command `overture`."""

import sys

from overture.cli import main

sys.exit(main())
