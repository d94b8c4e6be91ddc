"""Trained runs that answer: in the terminal and behind OpenAI's interface."""
