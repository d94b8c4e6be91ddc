"""The report of trainings and evaluations: results.md, figures, and report.html that opens from the disk."""
