"""Pictures and pages of runs: the contact sheet, report.html, the comparison of several."""

from acs_fast.report.comparison import compare
from acs_fast.report.page import write_report
from acs_fast.report.sheet import contact_sheet

__all__ = ["compare", "contact_sheet", "write_report"]
