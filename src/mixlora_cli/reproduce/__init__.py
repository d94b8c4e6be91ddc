"""`mixlora reproduce`: a table's grid of trainings and evaluations, each in its own process, then the table."""
