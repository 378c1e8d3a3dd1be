"""Backbones: loading them, telling their weights apart, building the nano one, and their attention in training.

In: a name, a folder or a Hub id. Out: a model and its processor. Read `loading.py` first.
"""
