"""Policies act in simulators, or answer recorded frames; every episode is logged, scored and reported.

In: a policy and environments. Out: `episodes.jsonl`, `results.json`, videos, `report.html`. Read `rollout.py` first,
then `driver.py` and `episode_log.py`.
"""
