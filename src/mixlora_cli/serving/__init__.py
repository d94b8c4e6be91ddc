"""Talking to trained runs: in the terminal, and as a server that answers many at once."""
