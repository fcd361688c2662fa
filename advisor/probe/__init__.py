"""Looks at the machine, the model and the data; the only code that does, and it never judges what it saw."""
