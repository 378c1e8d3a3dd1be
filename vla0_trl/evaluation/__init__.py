"""Policies act in simulators, or answer recorded frames; every episode is logged, scored and reported.

In: a policy and environments. Out: `episodes.jsonl`, `results.json`, videos, `report.html`. Read `driver.py` first,
then `rollout.py` and `episode_log.py`.
"""
