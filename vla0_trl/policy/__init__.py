"""A checkpoint becomes a policy: observations in, actions out, as text under a grammar.

In: a checkpoint folder and observations. Out: chunks of actions in environment units. Read `policy.py` first, then
`grammar.py` (which tokens may follow) and `execution.py` (how a chunk is executed). `speculative/` makes it fast; its
`self_check.py` decides who decodes: our decoder, or stock `generate()`.
"""
