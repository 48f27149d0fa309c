"""For the tests in a browser: whose processes they may end, and where their apps lie."""

from __future__ import annotations

import os

# Nobody else's: a clean-up ends all orphans of its user.
OURS = 60000 + os.getpid() % 1000
THEIRS = OURS + 1000
APPS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "ui", "apps")
