"""Trackers that ship with torchspec: one file each, its package imported when a run opens it."""
