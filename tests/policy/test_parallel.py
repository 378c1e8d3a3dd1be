"""Numbers read in parallel: logits as in a training row with the same numbers hidden, in as many passes as digits."""

import numpy as np
import pytest
import torch
from support.backbones import TINY, observations
from support.random_policies import (
    BACKBONES,
    assert_equal_logits,
    build_policy,
    decoder_of,
    generate,
    row_logits,
    sharpened,
    watched_reading,
)  # fmt: skip

from vla0_trl import VLADataCollator, VLAPolicy
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.policy.speculative import decoder as decoding
from vla0_trl.policy.speculative.options import DecodingOptions, DraftChoice, PromptError
from vla0_trl.policy.speculative.parallel import ParallelReader

NUMBER_TOKENS = "nano, one token per number"


@pytest.fixture(scope="module", params=[*BACKBONES, NUMBER_TOKENS])
def policy(request):
    """A policy for 8 values of a random backbone."""
    if request.param != NUMBER_TOKENS:
        return build_policy(request.param)
    config = build_policy("nano").config
    texts = ["Push it.\nState: ", "Push that thing over there, as far as you can."]
    model, processor = build_nano(NanoConfig(**TINY, number_tokens=True), num_bins=config.num_bins, texts=texts)
    return VLAPolicy(sharpened(model), processor, config)


def test_every_step_of_every_branch_has_the_logits_of_a_training_row(policy):
    batch = observations(3, seed=3)  # their prompts differ in length
    reader, decoder, seen = watched_reading(policy, batch)
    numbers = decoder.reading.numbers
    assert len({row.tobytes() for row in numbers}) > 1  # else the test would say little
    lengths = set()
    for row, observation in enumerate(batch):
        for position in range(8):
            hidden = np.arange(8) < position
            begin, logits = row_logits(policy, observation, numbers[row], hidden, reader.tree.token_ids)
            own = reader.branched.branch(position, numbers[row, position])
            _, roots = reader.branched.trunk(numbers[row], np.ones(8, bool))
            # Behind its last token a number is chosen to end there, if it could go on.
            for step in range(len(own) + (len(own) < reader.tree.depth)):
                if step < len(own) or seen[step][row, position].any():
                    assert_equal_logits(seen[step][row, position], logits[begin + roots[position] + step])
            lengths.add(len(own))
    assert lengths >= ({1} if policy.chat_tokenizer.can_keep_labels else {3})
    assert decoder.stats.passes == (1 if policy.chat_tokenizer.can_keep_labels else 3)


def test_the_first_pass_reads_the_row_that_the_collator_makes(policy):
    batch = observations(2, seed=5)
    reader, decoder, seen = watched_reading(policy, batch)
    collator = VLADataCollator(policy.processor, policy.config, mask_full=1.0, mask_skip=0.0, mask_max=1.0)
    rows = [
        {
            "images": [observation["images"]["image"]],
            "task": observation["task"],
            "raw_state": observation["state"],
            "raw_action": np.full(8, 256.0),
        }
        for observation in batch
    ]
    inputs = collator(rows)
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = policy.model(**inputs).logits[..., reader.tree.token_ids].numpy()
    masked = inputs["input_ids"] == policy.chat_tokenizer.mask_id
    for row in range(2):
        spaced = reader.branched.hidden[0][:-1]
        answer = np.flatnonzero(labels[row] != -100)[0] if spaced else np.flatnonzero(masked[row])[-8]
        places = np.flatnonzero(masked[row])
        places = places[places >= answer]
        assert (
            len(places) == 8 and decoder.reading.trunks[row] == inputs["input_ids"][row, answer : places[-1]].tolist()
        )
        assert_equal_logits(seen[0][row], logits[row, places - 1])


def test_answers_are_the_most_likely_numbers_and_follow_the_grammar(policy):
    batch = observations(4, seed=7)
    decoder = decoder_of(policy, mode="parallel")
    answers = generate(policy, batch, custom_generate=decoder)
    for row, tokens in enumerate(answers.tolist()):
        tokens = tokens[: tokens.index(policy.chat_tokenizer.end_of_turn_id) + 1]
        count, state = policy.grammar.initial_count, policy.grammar.initial_state
        for token in tokens:
            column = policy.grammar.token_ids.tolist().index(token)
            assert column in policy.grammar.choices(count, state)
            count, state = count + policy.grammar.finishes[column], policy.grammar.next_state[state, column]
        assert state == policy.grammar.done
        text = policy.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        assert [int(number) for number in text.split()] == decoder.reading.numbers[row].tolist()
    alone = [generate(policy, [o], custom_generate=decoder)[0].tolist() for o in batch]
    for row, tokens in zip(answers.tolist(), alone, strict=True):
        assert row[: len(tokens)] == tokens


@pytest.mark.parametrize("rounds", [1, 2])
def test_rounds_ask_again_what_the_model_is_least_sure_of(policy, rounds):
    """Their logits are those of plain forward passes over rows in which exactly these numbers are hidden."""
    batch = observations(2, seed=11)
    reader, decoder, seen = watched_reading(policy, batch, refine=rounds)
    tree, steps, numbers = reader.tree, iter(seen), decoder.reading.unrefined.copy()
    passes = 1 if policy.chat_tokenizer.can_keep_labels else 3
    assert passes + rounds <= decoder.stats.passes <= passes * (rounds + 1)
    asked, log_probs = np.ones((2, 8), bool), np.zeros((2, 8))
    for share in [1, *(left / (rounds + 1) for left in range(rounds, 0, -1))]:
        for row in range(2):
            asked[row] = np.isin(np.arange(8), np.argsort(log_probs[row], kind="stable")[: int(np.ceil(8 * share))])
        node, open_ = np.broadcast_to(reader.begin, (2, 8)), asked.copy()
        begins = [
            row_logits(policy, observation, numbers[row], asked[row], tree.token_ids)
            for row, observation in enumerate(batch)
        ]
        log_probs[asked] = 0
        for step, logits in enumerate(steps):
            for row, (begin, plain) in enumerate(begins if step == 0 else []):
                roots = reader.branched.trunk(numbers[row], asked[row])[1]
                assert_equal_logits(logits[row][asked[row]], plain[begin + roots][asked[row]])
            scores = np.where(reader.allowed(node, reader.ends), logits, -np.inf)
            chosen = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
            log_probs[open_] += chosen.max(-1)[open_]
            child = np.take_along_axis(tree.child[node], scores.argmax(-1)[..., None], -1)[..., 0]
            node = np.where(open_ & (child >= 0), child, node)
            open_ &= (child >= 0) & ~tree.leaf[node]
            if not open_.any():
                break
        numbers[asked] = tree.number[node][asked]
    np.testing.assert_array_equal(decoder.reading.numbers, numbers)
    np.testing.assert_allclose(decoder.reading.log_probs, log_probs, rtol=1e-4, atol=1e-6)
    assert next(steps, None) is None and (numbers != decoder.reading.unrefined).any()


def test_numbers_that_are_given_are_seen_and_kept(policy):
    """In one row two numbers are given, in another one none, in a third one all."""
    batch, given = observations(3, seed=17), [[511, 40], [], [5, 6, 7, 8, 9, 10, 11, 12]]
    beginnings = [policy.chat_tokenizer.encode_beginning(numbers) for numbers in given]
    assert [policy.decoder.reader.parse(tokens) for tokens in beginnings] == given
    decoder = decoder_of(policy, mode="parallel", refine=1)
    generate(policy, batch, custom_generate=decoder, beginnings=beginnings)
    reading, reader = decoder.reading, decoder.reader
    for row, (observation, known) in enumerate(zip(batch, given, strict=True)):
        assert reading.numbers[row, : len(known)].tolist() == known
        hidden = np.arange(8) >= len(known)
        begin, logits = row_logits(policy, observation, reading.unrefined[row], hidden, reader.tree.token_ids)
        ours = reading.logits[row][reading.roots[row][hidden]][:, reader.tree.order]
        assert_equal_logits(ours, logits[begin + reading.roots[row][hidden]]) if hidden.any() else None
    with pytest.raises(ValueError, match="can't be part of a number"):
        reader.parse(reader.branched.hidden[0])
    if space := reader.branched.hidden[1][:-1]:
        with pytest.raises(ValueError, match="these are not whole numbers"):
            reader.parse(beginnings[0] + space)


@pytest.mark.parametrize("size", [1, 4])
def test_own_drafts_never_change_a_token(policy, size, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_DRAFTED", {"cpu": 1024})
    monkeypatch.setattr(DraftChoice, "own", lambda self: True)
    batch = observations(size, seed=13)
    expected = generate(policy, batch)
    decoder = decoder_of(policy)
    for drafts in (None, [row.tolist() for row in expected.roll(1, 1)]):
        assert torch.equal(generate(policy, batch, custom_generate=decoder, drafts=drafts), expected)
    assert decoder.stats.own_drafts == 2 * size and decoder.stats.drafted > 0
    without = decoder_of(policy, own_drafts=False)
    assert torch.equal(generate(policy, batch, custom_generate=without), expected)
    assert without.stats.own_drafts == 0


def test_the_cheaper_draft_is_chosen_and_the_other_one_tried_again():
    choice = DraftChoice()
    chosen = []
    for _ in range(2 * choice.TRY_AGAIN):
        own = choice.own()
        choice.record(own, 3.0 if own else 9.0)
        chosen.append(own)
    assert chosen[:2] == [True, False] and chosen.count(False) == 3
    for _ in range(20):
        choice.record(True, 20.0)
    assert [choice.own() for _ in range(3)] == [False] * 3


def test_only_the_spelling_of_training_is_written(policy):
    """With numbers as tokens, the grammar would also allow digits."""
    batch = observations(3, seed=29)
    decoder = decoder_of(policy, mode="parallel")
    for row, tokens in enumerate(generate(policy, batch, custom_generate=decoder).tolist()):
        answer, _ = policy.chat_tokenizer.encode_answer(decoder.reading.numbers[row])
        end = answer.index(policy.chat_tokenizer.end_of_turn_id) + 1
        assert tokens[:end] == answer[:end]


def test_a_longer_prompt_gets_a_larger_cache_and_too_long_a_one_is_refused(policy):
    short, long = observations(1, seed=31), observations(1, seed=31)
    long[0]["task"] = "Push it. " * 60
    decoder = decoder_of(policy, mode="parallel", refine=1)
    generate(policy, short, custom_generate=decoder)
    small = decoder._forward.capacity
    answers = generate(policy, long, custom_generate=decoder)
    assert decoder._forward.capacity > small
    fresh = decoder_of(policy, mode="parallel", refine=1)
    assert torch.equal(answers, generate(policy, long, custom_generate=fresh))
    text_config = policy.model.config.get_text_config()
    positions, text_config.max_position_embeddings = text_config.max_position_embeddings, 90
    try:
        with pytest.raises(PromptError, match="don't fit into the model's 90 positions"):
            generate(policy, long, custom_generate=decoder)
    finally:
        text_config.max_position_embeddings = positions


def test_a_grammar_of_another_answer_is_refused(policy):
    for changes, theirs in [
        ({"chunk_size": 3}, "6 up to 511"),
        ({"waypoints": [0, 3], "n_action_steps": 4}, "4 up to 511"),
        ({"num_bins": 255}, "8 up to 255"),
    ]:
        chat = type(policy.chat_tokenizer)(policy.processor, policy.config.replace(**changes))
        with pytest.raises(ValueError, match=f"the grammar is of 8 integers up to 511, the config of {theirs}"):
            ParallelReader(chat, policy.grammar)
    with pytest.raises(ValueError, match="refine=8: an answer of 8 numbers has at most 7 rounds"):
        decoder_of(policy, mode="parallel", refine=8)


def test_numbers_that_cannot_be_read_in_parallel_are_decoded_exactly_or_refused(policy, monkeypatch):
    """Two numbers of one spelling, which no tokenizer here has."""
    chat, batch, parts = (
        policy.chat_tokenizer,
        observations(2, seed=37),
        (policy.model, policy.processor, policy.config),
    )
    expected = policy.predict_action_chunk(batch)
    table = [[*chat.spellings(place)[:-1], chat.spellings(place)[0]] for place in (0, 1)]
    with monkeypatch.context() as patch:
        patch.setattr(type(chat), "spellings", lambda self, position: table[min(position, 1)])
        with pytest.raises(ValueError, match="spells 511 as it spells another number"):
            VLAPolicy(*parts, DecodingOptions(mode="parallel"))
        exact = VLAPolicy(*parts)
    np.testing.assert_array_equal(exact.predict_action_chunk(batch), expected)
    assert exact.decoder.stats.chunks == 2 and exact.decoder.stats.own_drafts == 0
