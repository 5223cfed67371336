"""``python -m fastgan``."""

from __future__ import annotations

import sys

from fastgan.cli import main

sys.exit(main())
