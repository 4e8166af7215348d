"""Counting what a launch does, and the least time that a device could take for it."""
