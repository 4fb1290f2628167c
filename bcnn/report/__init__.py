"""Figures and pages from predictions and logs: no model, no trainer."""

from bcnn.report.files import write_figures
from bcnn.report.page import write_report
from bcnn.report.plots import plot_curves
from bcnn.report.predictions import Predictions

__all__ = ["Predictions", "plot_curves", "write_figures", "write_report"]
