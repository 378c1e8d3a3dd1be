"""Simulators and scripted experts. They know nothing of models; each is imported only by those who use it.

In: seeds and actions. Out: observations and results. Read `pusht/env.py` first, then `libero/protocol.py`.
"""
