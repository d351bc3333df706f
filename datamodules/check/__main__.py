"""`python -m datamodules.check DIR`: its command line lies with those of all commands."""

import sys

from launch.check import main

sys.exit(main(sys.argv[1:]))
