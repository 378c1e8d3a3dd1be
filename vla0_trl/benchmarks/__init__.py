"""What is measured: throughput of training and decoding, memory, and ablations.

In: everything else. Out: tables. Read `inference.py` first. Only `check` imports this room, for the table of memory.
"""
