"""`python -m datamodules.check DIR`."""

import sys

from datamodules.check.command import main

sys.exit(main(sys.argv[1:]))
