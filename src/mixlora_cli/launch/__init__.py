"""One process or many: a command's function runs in as many as the configuration or the cluster says."""
