"""Checkpoints: asynchronous, committed whole or not at all, restored strictly and verified to the bit."""
