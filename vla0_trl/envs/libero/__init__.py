"""LIBERO: its simulator (`env.py`), with one thing changed (`perturb.py`), and every constant of the benchmark
(`protocol.py`); a scripted expert (`expert.py`), and a teacher that labels any state (`teacher.py`).
"""
