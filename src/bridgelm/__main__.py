"""`python -m bridgelm` is `bridgelm`."""

import sys

from bridgelm.cli.main import main

sys.exit(main())
