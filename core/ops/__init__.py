"""Elementwise pieces of a training step in plain torch: what a device's `FusedOps` does where it has no kernel."""
