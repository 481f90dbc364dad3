"""``python -m tstitch_jax.cli``."""

import sys

from tstitch_jax.cli import main

sys.exit(main())
