"""Reports: recorded values of a distillation experiment become one HTML page that a person enjoys.

page(Report(title=..., arms=[...], ...))     # text that needs no other file
"""

from kddata.report.page import page
from kddata.report.sweeps import TrialResult, ranked, reason, sweep_csv, sweep_page, table_rows
from kddata.report.values import COLUMNS, LABELS_OF, Arm, Comparison, Cost, Kind, Report, Sample, StepAgreement

__all__ = [
    "COLUMNS",
    "LABELS_OF",
    "Arm",
    "Comparison",
    "Cost",
    "Kind",
    "Report",
    "Sample",
    "StepAgreement",
    "TrialResult",
    "page",
    "ranked",
    "reason",
    "sweep_csv",
    "sweep_page",
    "table_rows",
]
