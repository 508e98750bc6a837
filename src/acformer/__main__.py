"""`python -m acformer`: the command line."""

import sys

from acformer.cli import main

sys.exit(main())
