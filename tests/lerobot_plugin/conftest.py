"""Makes `delivering` and `stand_in_robot` importable here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
