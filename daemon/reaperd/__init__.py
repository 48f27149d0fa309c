"""The daemon, its control command and all that decides and signals; what runs in a user's process is ``agent``."""

__version__ = "0.1.0"
