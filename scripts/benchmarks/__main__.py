"""Runs the benchmark: ``python -m scripts.benchmarks``."""

import sys

from scripts.benchmarks.main import main

sys.exit(main())
