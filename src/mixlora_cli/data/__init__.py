"""Records, conversation templates and batches."""
