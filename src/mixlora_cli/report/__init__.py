"""The report of one or several evaluations: results.md, and report.html that opens from the disk."""
