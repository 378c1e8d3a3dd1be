"""PushT: gym-pusht with exact seeds, an expert that plans its pushes, and a teacher that is fitted to the expert.

`env.py` first; then `expert.py`, which `planner.py` and `geometry.py` serve; then `teacher.py`, which `teaching.py`
makes with `driving.py` (undrawn episodes) and `fitting.py` (regression).
"""
