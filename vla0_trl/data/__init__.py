"""Episodes become a chat dataset on disk: one row per frame, in the layout of the Hub.

In: a `Source` of episodes (`episodes.py`; the formats of others are in `sources/`). Out: a folder that
`datasets.load_dataset` reads. Read `episodes.py` first, then `convert.py` and `chat_dataset.py`.
"""
