"""Where a benchmark's instances come from: the hub, a local copy, parquet files, or a user's own YAML file."""
