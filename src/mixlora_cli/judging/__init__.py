"""Judges: a second opinion on stored answers, by a rule, a local language model or a server."""
