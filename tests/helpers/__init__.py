"""What several tests use: small feeds and trees, hosts, launches, stand-ins for slow parts."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
SCANS = Path(os.environ.get("NEUROJEPA_SCANS", ROOT.parent / "shared" / "data"))  # if any
