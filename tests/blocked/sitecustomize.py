"""Loaded by every Python process that a test starts: blocks the network there too."""

import network_block

network_block.install()
