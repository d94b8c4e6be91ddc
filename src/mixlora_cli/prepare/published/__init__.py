"""Checkpoints of the code published with the paper: read them safely and turn them into our adapter folders."""
