"""The grammar under random logits: every output parses, and it never changes a greedy answer that was valid."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backbones import DIGITS, MULTI, Chat, multi_digit_tokenizer

from vla0_trl.actions import join_integers, parse_integers
from vla0_trl.policy.grammar import BEFORE_PREFIX, ActionGrammar, ActionGrammarLogitsProcessor
from vla0_trl.processing.chat_tokenizer import ChatTokenizer


def decode_random(grammar: ActionGrammar, chat, rows: int, seed: int, vocabulary: int) -> tuple[list[str], np.ndarray]:
    """Answers to random scores, decoded as `generate` does: greedy, padding rows that have ended."""
    generator = torch.Generator().manual_seed(seed)
    processor = ActionGrammarLogitsProcessor(grammar=grammar)
    sequences = torch.zeros(rows, 3, dtype=torch.long)
    ended = torch.zeros(rows, dtype=torch.bool)
    for _ in range(grammar.max_new_tokens):
        scores = processor(sequences, torch.randn(rows, vocabulary, generator=generator))
        token = scores.argmax(-1).masked_fill(ended, chat.tokenizer.pad_token_id)
        sequences = torch.cat([sequences, token[:, None]], 1)
        ended |= token == chat.end_of_turn_id
        if ended.all():
            break
    assert ended.all()
    answers = [row[: row.tolist().index(chat.end_of_turn_id)] for row in sequences[:, 3:]]
    return [chat.tokenizer.decode(answer, clean_up_tokenization_spaces=False) for answer in answers], sequences


def assert_all_parse(texts: list[str], num_values: int, num_bins: int, prefix: str) -> None:
    for text in texts:
        assert text.startswith(prefix)
        integers = parse_integers(text, num_values, num_bins)
        assert text == prefix + join_integers(integers)


def test_random_logits_always_parse_with_real_tokenizers(backbone):
    _, processor, config = backbone
    chat = ChatTokenizer(processor, config)
    # Wider than the tokenizer, as Qwen's head is.
    vocabulary = len(processor.tokenizer) + 7
    for num_values, num_bins, rows in ((6, 511, 60), (1, 1000, 120), (20, 7, 30)):
        grammar = ActionGrammar(chat, num_values, num_bins)
        texts, _ = decode_random(grammar, chat, rows, 0, vocabulary)
        assert_all_parse(texts, num_values, num_bins, chat.prefix)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 12), st.sampled_from([1, 9, 10, 99, 511, 1000]), st.sampled_from(["", " "]), st.integers(0, 10**6)
)
def test_random_logits_always_parse_with_multi_digit_tokens(num_values, num_bins, prefix, seed):
    chat = Chat(multi_digit_tokenizer(MULTI), prefix)
    texts, _ = decode_random(ActionGrammar(chat, num_values, num_bins), chat, 70, seed, len(chat.tokenizer))
    assert_all_parse(texts, num_values, num_bins, prefix)


def test_dead_ends_are_never_entered():
    # No bare space: after "1" only "Ġ5" or "Ġ51" can go on, and "5Ġ" needs another number with its own digits.
    chat = Chat(multi_digit_tokenizer([*DIGITS, "Ġ5", "Ġ51"]))
    texts, _ = decode_random(ActionGrammar(chat, 4, 511), chat, 200, 1, len(chat.tokenizer))
    assert_all_parse(texts, 4, 511, "")
    assert all(number.startswith("5") for text in texts for number in text.split()[1:])


def test_a_tokenizer_that_cannot_spell_raises():
    with pytest.raises(ValueError, match="can't spell"):
        ActionGrammar(Chat(multi_digit_tokenizer(DIGITS)), 2, 9)


def test_greedy_under_the_grammar_is_greedy_without_it_when_that_is_valid():
    """A model whose favourite is a valid answer, in any spelling, is not disturbed."""
    tokenizer = multi_digit_tokenizer(MULTI)
    chat = Chat(tokenizer, " ")
    grammar = ActionGrammar(chat, 3, 511)
    spellings = [["Ġ", "1", "2", "Ġ5", "Ġ", "0"], ["Ġ1Ġ2Ġ", "99"], ["Ġ51", "1", "Ġ", "123", "Ġ5", "1", "1"]]
    for spelling in spellings:
        favourite = [*tokenizer.convert_tokens_to_ids(spelling), chat.end_of_turn_id]
        processor, sequence = ActionGrammarLogitsProcessor(grammar=grammar), torch.zeros(1, 2, dtype=torch.long)
        for token in favourite:
            scores = torch.randn(1, len(tokenizer))
            scores[0, token] = 10.0
            assert processor(sequence, scores.clone()).argmax().item() == token, spelling
            sequence = torch.cat([sequence, torch.tensor([[token]])], 1)


def test_no_leading_zeros_no_overflow_and_no_early_end():
    chat = Chat(multi_digit_tokenizer(MULTI))
    names = chat.tokenizer.convert_ids_to_tokens(list(range(len(chat.tokenizer))))

    def allowed_after(*tokens: str) -> set[str]:
        processor, sequence = ActionGrammarLogitsProcessor(grammar=ActionGrammar(chat, 2, 511)), [0]
        for token in [*tokens, None]:
            scores = processor(torch.tensor([sequence]), torch.zeros(1, len(names)))
            sequence.append(names.index(token) if token else 0)
        return {names[i] for i in scores[0].isfinite().nonzero().flatten()}

    assert allowed_after() == {*DIGITS, "12", "123", "99", "10", "5Ġ", "1Ġ2"}
    assert allowed_after("0") == {"Ġ", "Ġ5", "Ġ51"}
    assert allowed_after("5", "1") == {"0", "1", "Ġ", "Ġ5", "Ġ51", "1Ġ2"}
    assert allowed_after("5", "Ġ") == {*DIGITS, "12", "123", "99", "10"}
    assert allowed_after("5", "Ġ5", "1") == {"0", "1", "<eos>"}
    assert allowed_after("5", "Ġ5", "<eos>") == {"<eos>"}


def test_allowed_tokens_of_minus_infinity_still_win():
    chat = Chat(multi_digit_tokenizer(MULTI))
    processor = ActionGrammarLogitsProcessor(grammar=ActionGrammar(chat, 1, 9))
    scores = processor(torch.zeros(1, 1, dtype=torch.long), torch.full((1, len(chat.tokenizer)), -torch.inf))
    names = chat.tokenizer.convert_ids_to_tokens([scores.argmax().item()])
    assert names[0] in DIGITS


def test_rows_are_independent_and_reset_forgets(backbone):
    _, processor, config = backbone
    chat = ChatTokenizer(processor, config)
    grammar = ActionGrammar(chat, 4, 511)
    together, _ = decode_random(grammar, chat, 8, 3, len(processor.tokenizer))
    again, _ = decode_random(grammar, chat, 8, 3, len(processor.tokenizer))
    assert together == again and len(set(together)) == 8
    logits = ActionGrammarLogitsProcessor(processor, config)
    first = logits(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, len(processor.tokenizer)))
    logits.reset()
    assert torch.equal(first, logits(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, len(processor.tokenizer))))


def test_choices_on_the_host_are_what_the_processor_allows():
    for tokens, prefix in ((MULTI, " "), (MULTI, ""), ([*DIGITS, "Ġ5", "Ġ51"], "")):
        chat = Chat(multi_digit_tokenizer(tokens), prefix)
        grammar = ActionGrammar(chat, 4, 511)
        rng = np.random.default_rng(0)
        for _ in range(40):
            processor, sequence = ActionGrammarLogitsProcessor(grammar=grammar), [0]
            count, state = grammar.initial_count, grammar.initial_state
            while state != grammar.done:
                scores = processor(torch.tensor([sequence]), torch.zeros(1, len(chat.tokenizer)))
                choices = grammar.choices(count, state)
                ids = grammar.token_ids[choices].tolist()
                assert ids == scores[0].isfinite().nonzero().flatten().tolist()
                column = rng.choice(choices)
                sequence.append(int(grammar.token_ids[column]))
                count, state = count + grammar.finishes[column], grammar.next_state[state, column]


def test_the_classes_example_of_states():
    """`ActionGrammar`'s docstring: " 7 12 0", token by token."""
    grammar = ActionGrammar(Chat(multi_digit_tokenizer([*DIGITS, "Ġ"]), " "), num_values=3, num_bins=12)
    tokenizer = multi_digit_tokenizer([*DIGITS, "Ġ"])
    names = {column: tokenizer.decode([token]) for column, token in enumerate(grammar.token_ids)}
    column = {name: column for column, name in names.items()}
    count, state, steps = grammar.initial_count, grammar.initial_state, []
    for name in [" ", "7", " ", "1", "2", " ", "0", "<eos>"]:
        steps.append((count, state, {names[column] for column in grammar.choices(count, state)}))
        count, state = count + grammar.finishes[column[name]], grammar.next_state[state, column[name]]
    assert steps == [
        (BEFORE_PREFIX, grammar.start, {" "}),
        (0, grammar.open, set(DIGITS)),
        (0, 7, {" "}),
        (1, grammar.open, set(DIGITS)),
        (1, 1, {"0", "1", "2", " "}),
        (1, 12, {" "}),
        (2, grammar.open, set(DIGITS)),
        (2, 0, {"<eos>"}),
    ]
    assert (count, state) == (2, grammar.done)
