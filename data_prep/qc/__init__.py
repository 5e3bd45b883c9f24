"""Quality of a scan: figures in native space, what the scan is, and which thresholds it crosses.

Figures are always stored; a figure that cannot be measured is None, with ``<name>_reason``.
Thresholds live in ``qc.yaml``.
"""

from data_prep.qc.describe import describe
from data_prep.qc.figures import FIGURES, quality
from data_prep.qc.judge import flags, outliers, rejection
from data_prep.rows import Figures

__all__ = ["FIGURES", "Figures", "describe", "flags", "outliers", "quality", "rejection"]
