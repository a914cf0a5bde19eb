"""What the initramfs executes as PID 1: ``/usr/bin/python3 -I -S -B -X frozen_modules=on .../launcher.py``.

Without the site module nothing but the standard library can be imported; the agent and what it needs lie in
the directory that holds its package.
"""

import os
import sys
import time

#: The end of what the kernel, the initramfs and the interpreter took; what follows is the agent's own.
began_us = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from vmsandbox_agent import unneeded  # noqa: E402 - not to be found before

unneeded.postpone()

from vmsandbox_agent.main import main  # noqa: E402 - imports what was postponed

sys.exit(main(began_us=began_us))
