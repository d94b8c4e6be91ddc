"""The paper's tables from stored evaluations: layout, published numbers, intervals, paired tests, files."""
