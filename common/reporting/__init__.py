"""Reports: results, tables, plots, model cards, and the command that compares runs."""
