"""The agent inside the guest; see docs/agent.md."""

__version__ = "0.1.0"
