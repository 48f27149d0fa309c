"""``reaperctl ui``: a page in the browser, for who runs it and on this machine alone.

It shows what the other commands print, and does what they do, with the rights of who started it.
"""
