"""`python -m activedpo_fast` is the command `activedpo`."""

import sys

if not sys.flags.safe_path:
    # The current folder, which -m puts first: a file torch.py or triton.py in it is no module of
    # ours, and would be run. This package is found already, wherever it is.
    del sys.path[0]

from activedpo_fast.cli.app import main  # noqa: E402

sys.exit(main())
