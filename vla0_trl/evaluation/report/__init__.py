"""Finished evaluations become tables, charts and a page that one can open without a server."""
