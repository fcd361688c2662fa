"""Runs a planned training: the supervisor, its events, its decisions and its report."""
