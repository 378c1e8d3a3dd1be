"""How a parallel reading writes numbers: its example of a pass, and tokenizers that can't be read in parallel."""

import numpy as np
import pytest
from support.backbones import DIGITS, multi_digit_tokenizer

from vla0_trl.config import VLAConfig
from vla0_trl.policy.grammar import ActionGrammar
from vla0_trl.policy.speculative.parallel import ParallelReader
from vla0_trl.processing.branches import PassToken


class Numbers:
    """What a reader needs of a chat tokenizer, for numbers 0 to 12 in any spelling."""

    def __init__(self, tokenizer, spell, prefix=""):
        self.tokenizer, self.prefix, self.end_of_turn_id = tokenizer, prefix, tokenizer.eos_token_id
        self.config = VLAConfig(action_dim=2, chunk_size=1, num_bins=12)
        self.spell = spell

    def spellings(self, position):
        return [self.tokenizer.convert_tokens_to_ids(self.spell(number)) for number in range(13)]

    def placeholder(self, position):
        return self.tokenizer.convert_tokens_to_ids(["Ġ", "?"] if self.prefix else ["?"])


class Recorder:
    """Passes that choose "1" and "1" first, then "2" and the end; keeps what was read."""

    rows, passes = 1, []

    def __init__(self, columns):
        self.columns = columns

    def padding(self, width):
        return np.zeros((1, width, len(PassToken._fields)), np.int64)

    def logits(self, *chosen):
        return np.eye(max(self.columns.values()) + 1, dtype=np.float32)[None, [self.columns[name] for name in chosen]]

    def step(self, tokens):
        self.passes.append([PassToken(*token) for token in tokens[0].tolist()])
        return self.logits("2", "end")


def test_the_modules_example_of_a_pass():
    chat = Numbers(multi_digit_tokenizer([*DIGITS, "Ġ", "?"]), lambda number: ["Ġ", *str(number)], prefix=" ")
    grammar = ActionGrammar(chat, 2, 12)
    one, two, space, mask = chat.tokenizer.convert_tokens_to_ids(["1", "2", "Ġ", "?"])
    ids = grammar.token_ids.tolist()
    columns = {"1": ids.index(one), "2": ids.index(two), "end": ids.index(chat.end_of_turn_id)}
    forward, trunks = Recorder(columns), []
    reader = ParallelReader(chat, grammar)
    reading = reader.read(forward, 4, lambda rows: trunks.append(rows) or forward.logits("1", "1", "1", "end"), [[]])
    assert trunks == [[[space, mask, space]]] and reading.numbers.tolist() == [[12, 1]]
    assert forward.passes == [
        [
            PassToken(token_id=one, position=1, cache_slot=7, visible_until=4, visible_from=7),
            PassToken(one, 3, 9, 6, 9),
        ]
    ]


@pytest.mark.parametrize(
    ("spell", "mistake"),
    [
        (lambda number: [*str(number)], "has a token that may continue a number or begin the next one"),
        (lambda number: ["Ġ", str(number % 10)], "spells 10 as it spells another number"),
        (lambda number: ["a", *str(number)], "is not of digits and spaces alone"),
    ],
)
def test_numbers_that_tokens_do_not_tell_apart_are_refused(spell, mistake):
    chat = Numbers(multi_digit_tokenizer([*DIGITS, "Ġ", "?", "a"]), spell)
    with pytest.raises(ValueError, match=mistake):
        ParallelReader(chat, ActionGrammar(chat, 2, 12))
