"""The kernel's interfaces, one a file: thin, typed, they know how and never why."""
