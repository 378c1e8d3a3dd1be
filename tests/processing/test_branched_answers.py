"""Rows of training whose numbers are branches: what stands where, what it attends to, and how it is refused."""

import numpy as np
import torch
from support.backbones import SMOLVLM
from support.random_policies import build_policy

from vla0_trl.processing.branches import BranchedAnswer, visible


def test_the_modules_example_of_a_row():
    chat = build_policy(SMOLVLM).chat_tokenizer  # its answers begin with a space
    text, labels = BranchedAnswer(chat).row(np.array([12, 7]), first_slot=4)
    names = chat.tokenizer.convert_ids_to_tokens(text.token_id.tolist())
    end = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id)
    more = len(names) - 9  # tokens of the template behind the end of the turn
    assert names[:5] == ["Ġ", "?", "Ġ", "?", end] and names[5 + more :] == ["1", "2", "7", end]
    positions, slots = [0, 1, 2, 3, 4], [4, 5, 6, 7, 8]
    assert text.position.tolist()[:5] + text.position.tolist()[5 + more :] == [*positions, 1, 2, 3, 4]
    assert text.cache_slot.tolist() == list(range(4, 4 + len(names)))
    assert text.visible_until.tolist()[:5] == slots and text.visible_from.tolist()[:5] == slots
    assert text.visible_until.tolist()[5 + more :] == [4, 4, 6, 6]
    assert text.visible_from.tolist()[5 + more :] == [9 + more, 9 + more, 11 + more, 11 + more]
    fields = [torch.from_numpy(field)[None] for field in text[2:]]
    seen = visible(torch.arange(4 + len(names)), *fields, not_padding=torch.ones(1, 4 + len(names), dtype=torch.bool))
    rows = ["".join(".x"[slot] for slot in slots) for slots in seen[0].int().tolist()]
    hidden = "." * more
    assert [rows[0][4:], rows[3][4:]] == ["x........" + hidden, "xxxx....." + hidden]
    assert rows[5 + more :] == [
        f"xxxx{row[:5]}{hidden}{row[5:]}" for row in ("x....x...", "x....xx..", "xxx....x.", "xxx....xx")
    ]
    targets = chat.tokenizer.convert_ids_to_tokens([label if label >= 0 else chat.pad_id for label in labels])
    assert targets[:5] == ["Ġ", "1", "Ġ", "7", end]
    assert labels[5 + more] == -100 and targets[6 + more :] == ["2", "Ġ", end]
