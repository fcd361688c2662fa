"""ftadvisor: from a GPU and data to a verified model file that runs offline."""

__version__ = "0.1.0"
