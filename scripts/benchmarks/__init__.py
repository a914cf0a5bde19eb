"""What `scripts/bench` measures, and how; docs/performance.md explains the method to readers of the figures."""
