"""Figures and pages from predictions and logs: no model, no trainer."""
