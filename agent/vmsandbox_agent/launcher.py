"""What the initramfs executes as PID 1: ``/usr/bin/python3 -I -S -B -X frozen_modules=on .../launcher.py``.

Without the site module nothing but the standard library can be imported; the agent and what it needs lie in
the directory that holds its package.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from vmsandbox_agent.main import main

sys.exit(main())
