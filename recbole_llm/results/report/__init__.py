"""A report of runs and analyses: one HTML file that opens offline, with tables, plots, commands and settings."""
