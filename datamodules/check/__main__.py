"""`python -m fedseg.datamodules.check DIR`: its command line lies with those of all commands."""

import sys

from fedseg.launch.check import main

sys.exit(main())
