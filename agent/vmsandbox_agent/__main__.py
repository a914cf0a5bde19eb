"""``python -m vmsandbox_agent``."""

import sys

from vmsandbox_agent.main import main

sys.exit(main())
