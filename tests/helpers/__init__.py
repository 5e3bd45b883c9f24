"""What several tests use: small feeds and trees, hosts, launches, stand-ins for slow parts."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
