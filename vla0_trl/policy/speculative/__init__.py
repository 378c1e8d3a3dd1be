"""Greedy decoding of action text in fewer forward passes, with the same tokens as stock `generate()`.

The policy calls `decode` in `self_check.py`: our decoder, or stock `generate()` where ours has failed its check.
Read `decoder.py` first (the loop), then `draft_state.py` (what is guessed), `tree_forward.py` (one forward pass) and
`parallel.py` (all numbers at once: a draft, or an answer of its own).
"""
