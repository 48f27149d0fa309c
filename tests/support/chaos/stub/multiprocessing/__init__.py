"""Stands in for the real package in a tracker look-alike, which needs its command line alone."""
