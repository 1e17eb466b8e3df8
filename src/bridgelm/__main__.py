"""`python -m bridgelm` is `bridgelm`."""

import sys

from bridgelm.cli import main

sys.exit(main())
