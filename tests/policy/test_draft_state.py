"""What a row of a batch knows of its answer between passes: forced tokens, drafts, and the tokens of the next pass."""

import pytest
import torch
from support.backbones import DIGITS, Chat, multi_digit_tokenizer
from support.random_policies import BACKBONES, build_policy

from vla0_trl.policy.grammar import ActionGrammar
from vla0_trl.policy.speculative.draft_state import DraftState, Speller
from vla0_trl.processing.branches import PassToken, visible


@pytest.fixture(scope="module", params=BACKBONES)
def policy(request):
    return build_policy(request.param)


def test_forced_tokens_are_those_without_alternative(policy):
    speller = Speller(policy.grammar)
    number = {name: speller.column[policy.processor.tokenizer.convert_tokens_to_ids(name)] for name in [*DIGITS, "Ġ"]}
    for written, forced in (
        ("5", None),
        ("51", None),
        ("510", "Ġ"),
        ("52", "Ġ"),
        ("0", "Ġ"),
        ("99", "Ġ"),
        ("6", None),
    ):
        state = policy.grammar.open
        for digit in written:
            _, state = speller.after(0, state, number[digit])
        assert speller.forced(0, state) == (number[forced] if forced else None), written
    _, full = speller.after(7, policy.grammar.open, number["0"])
    assert speller.token_ids[speller.forced(7, full)] == policy.chat_tokenizer.end_of_turn_id
    assert Speller(policy.grammar, forced_tokens=False).forced(0, full) is None


def test_a_draft_is_left_and_rejoined(policy):
    end = policy.chat_tokenizer.end_of_turn_id
    ids = policy.chat_tokenizer.encode_answer([511, 341, 7, 0, 1, 2, 3, 4])[0]
    answer = policy.chat_tokenizer.encode_answer([511, 358, 7, 0, 1, 2, 3, 4])[0]
    speller = Speller(policy.grammar)
    row, on_draft = DraftState(speller, ids), {}
    while not row.done:
        guess = [speller.token_ids[column] for column in row.guess(64)]
        on_draft[len(row.tokens)] = bool(guess)
        assert ids[ids.index(end) + 1 - len(guess) : ids.index(end) + 1] == guess
        row.write(speller.column[answer[len(row.tokens)]])
    assert row.tokens == answer[: answer.index(end) + 1]
    number = policy.chat_tokenizer.encode_answer([511, 3])[0].index(end)  # tokens up to the 3 of 358
    assert on_draft.pop(number + 1) is False
    assert all(on_draft.values()) and len(on_draft) > 8


def test_a_step_is_guessed_to_be_like_the_one_before(policy):
    speller, end = Speller(policy.grammar), policy.chat_tokenizer.end_of_turn_id
    answer = policy.chat_tokenizer.encode_answer([255, 31, 255, 31, 255, 39, 7, 39])[0]
    answer = answer[: answer.index(end) + 1]
    row, right = DraftState(speller, period=2), []
    while not row.done:
        guess = [speller.token_ids[column] for column in row.guess(64)]
        right.append(bool(guess) and guess[0] == answer[len(row.tokens)])
        row.write(speller.column[answer[len(row.tokens)]])
    # The first step is new, and so is a digit that differs, with what follows it up to the next number.
    assert not any(right[:5]) and sum(right) >= 9, right


@pytest.mark.parametrize(
    ("tokens", "draft", "model", "answer", "guess"),
    [
        # Behind the draft's own tokens the model would write other ones: "345 7 12 5" as "39…", "8", "134", "6".
        ([*DIGITS, "Ġ"], "3 4 5 Ġ 7 Ġ 1 2 Ġ 5 E", "3 9 5 Ġ 8 Ġ 1 3 4 6 E", "3 9", "8 Ġ 1 3 4 Ġ 6 E"),
        # One token per number, with its space: what follows does not depend on the number that is written.
        ([f"Ġ{digit}" for digit in DIGITS], "Ġ3 Ġ7 Ġ2 Ġ5 E", "Ġ4 Ġ8 Ġ2 Ġ6 E", "Ġ4", "Ġ8 Ġ2 Ġ6 E"),
    ],
    ids=["digits", "one token per number"],
)
def test_a_draft_becomes_what_the_model_would_write_behind_its_own_beginning(tokens, draft, model, answer, guess):
    chat = Chat(multi_digit_tokenizer(tokens), prefix=" " if "Ġ" not in tokens else "")
    grammar = ActionGrammar(chat, 4, 511 if "Ġ" in tokens else 9)
    ids = {name: chat.tokenizer.convert_tokens_to_ids(name) for name in tokens} | {"E": chat.end_of_turn_id}
    speller = Speller(grammar)
    row = DraftState(speller, [ids[name] for name in draft.split()])
    tree = row.grow(4, row.guess(64), [])
    logits = torch.zeros(len(tree.tokens), len(grammar.token_ids))
    for place, name in enumerate(model.split()):
        logits[place - 1, speller.column[ids[name]]] = 1
    row.follow(tree, logits.numpy())
    assert row.tokens == [ids[name] for name in answer.split()]
    if "Ġ" in tokens:
        assert row.guess(64) == []  # in the midst of a number that the draft began otherwise
        row.write(speller.column[ids["0"]])  # which forces a space
    row.window = 64
    assert [speller.token_ids[column] for column in row.guess(64)] == [ids[name] for name in guess.split()]


def test_the_modules_example_of_a_pass():
    """`tree_forward`'s docstring: 0 or 1 comes next, either forces a space, and one pass reads both."""
    chat = Chat(multi_digit_tokenizer([*DIGITS, "Ġ"]))
    grammar = ActionGrammar(chat, 4, 1)
    zero, one, space = chat.tokenizer.convert_tokens_to_ids(["0", "1", "Ġ"])
    speller = Speller(grammar)
    row = DraftState(speller)
    row.write(speller.column[one])
    tree = row.grow(4, [], row.candidates())
    assert tree.tokens == [
        PassToken(token_id=one, position=0, cache_slot=4, visible_until=4, visible_from=4),
        PassToken(space, 1, 5, 5, 5),
        PassToken(zero, 2, 6, 5, 6),
        PassToken(space, 3, 7, 5, 6),
        PassToken(one, 2, 8, 5, 8),
        PassToken(space, 3, 9, 5, 8),
    ]

    fields = torch.tensor([tree.tokens]).unbind(-1)[2:]
    seen = visible(torch.arange(10), *fields, not_padding=torch.ones(1, 10, dtype=torch.bool))[0]
    assert ["".join(".x"[slot] for slot in slots) for slots in seen.int().tolist()] == [
        "xxxxx.....",
        "xxxxxx....",
        "xxxxxxx...",
        "xxxxxxxx..",
        "xxxxxx..x.",
        "xxxxxx..xx",
    ]

    # The second token's logits choose 1, which forces a space; the last token's choose 0, which forces another.
    logits = torch.zeros(len(tree.tokens), len(grammar.token_ids))
    logits[1, speller.column[one]] = logits[5, speller.column[zero]] = 1
    row.follow(tree, logits.numpy())
    assert row.tokens == [one, space, one, space, zero, space]
    assert row.read == 2 and row.grow(4, [], []).tokens[0] == PassToken(one, 2, 6, 6, 6)
