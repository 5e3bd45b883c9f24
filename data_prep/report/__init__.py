"""An archive on one HTML page: report.py puts it together, counts.py has tables, figures.py draws.
"""
