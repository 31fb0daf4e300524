"""Where these tests are for."""

import sys

# A Mac runs kernels on its GPU and has no emulator to test. Everywhere else they run, and fail if they cannot.
collect_ignore_glob = ["test_*.py"] if sys.platform == "darwin" else []
