"""Supervised fine-tuning with TRL: from a parsed recipe to a saved policy.

In: arguments (`arguments.py`) and a chat dataset. Out: a checkpoint folder. Read `run.py` first, then `trainer.py`;
its collator is in `row_trace.py`, and it saves by `checkpoints.py`. `claim.py` says to which run a folder belongs.
"""
