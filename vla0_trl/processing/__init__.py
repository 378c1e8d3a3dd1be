"""A row or an observation becomes what a model reads: token ids, labels, masks and pixels.

In: rows of a chat dataset, or what a robot sees. Out: batches. Read `chat.py` first (the prompt), then
`chat_tokenizer.py`, `images.py` and `collator.py`. Training, evaluation and serving share these functions.
"""
