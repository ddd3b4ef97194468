"""`python -m activedpo_fast` is the command `activedpo`."""

import sys

from activedpo_fast.cli import main

sys.exit(main())
