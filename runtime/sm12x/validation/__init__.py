"""The validation kit behind ``python -m sm12x validate``: cases, device buffers, checks, probes and
timings.
"""
