"""LIBERO: its simulator (`env.py`), every constant of the benchmark (`protocol.py`), set-up, and a scripted expert."""
