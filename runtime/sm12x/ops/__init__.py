"""The operations, one module each, and what they share."""
