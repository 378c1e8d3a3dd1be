"""`python -m vla0_trl.check`: what will work on this machine, and how to fix what won't.

In: the machine. Out: one line per check, and exit status 0 or 1. Read `__main__.py` first (the command), then
`checks.py` (the list) and `process.py` (each check has a process of its own). This room stands above all others, and
imports them only inside such a process.
"""
