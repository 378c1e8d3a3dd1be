"""What is measured: throughput of training and decoding, memory, and ablations.

Only `check` imports this room, for the table of memory.
"""
