"""`python -m activedpo_fast` is the command `activedpo`."""

import sys

from activedpo_fast.cli.app import main

sys.exit(main())
