"""Training for parallel decoding: its branches are what the decoder reads, and the loss is that of plain rows."""

import numpy as np
import pytest
import torch
from support.backbones import QWEN, SMOLVLM, TINY, observations
from support.random_policies import assert_equal_logits, build_policy, row_logits, watched_reading
from support.runs import losses, predicts, run

from vla0_trl import VLADataCollator
from vla0_trl.actions import join_integers
from vla0_trl.models.attention import TrainingForward
from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.processing.chat_tokenizer import IGNORED
from vla0_trl.training.run import SetupError
from vla0_trl.training.trainer import attend_to_branches


@pytest.fixture(params=["nano", SMOLVLM])
def policy(request):
    """Whose model has the mask of branches, as in training."""
    policy = build_policy(request.param)
    attend_to_branches(TrainingForward(policy.model))
    return policy


def branched_batch(policy, batch, numbers, **options):
    """Rows of observations with these answers, (B, N), as the collator makes them."""
    collator = VLADataCollator(policy.processor, policy.config, **{"mask_branches": 1.0} | options)
    rows = [
        {
            "images": [observation["images"]["image"]],
            "task": observation["task"],
            "state": join_integers(policy.state_quantizer.encode(observation["state"])),
            "action": join_integers(row),
            "episode_index": index,
            "frame_index": 0,
        }
        for index, (observation, row) in enumerate(zip(batch, numbers, strict=True))
    ]
    return collator, collator(rows)


def places_of(collator, inputs, row, numbers):
    """Of each number, the place in its row of the token that it begins behind, and those of its own tokens."""
    begin = int((inputs["labels"][row] != IGNORED).nonzero()[0])
    text, _ = collator.branched.row(numbers, begin)
    _, roots = collator.branched.trunk(numbers, np.ones(8, bool))
    at = len(text.token_id) - sum(len(collator.branched.branch(k, n)) for k, n in enumerate(numbers)) - 1
    places = []
    for position, number in enumerate(numbers):
        own = len(collator.branched.branch(position, number))
        places.append([begin + roots[position], *range(begin + at, begin + at + own)])
        at += own
    return places


def test_a_branch_has_the_logits_that_parallel_decoding_computes(policy):
    batch = observations(3, seed=3)
    reader, decoder, seen = watched_reading(policy, batch)
    numbers = decoder.reading.numbers
    collator, inputs = branched_batch(policy, batch, numbers)
    with torch.no_grad():
        logits = policy.model(**inputs).logits[..., reader.tree.token_ids].numpy()
    compared = 0
    for row in range(3):
        places = places_of(collator, inputs, row, numbers[row])
        for position, own in enumerate(places):
            for step, place in enumerate(own):
                if step < len(seen) and seen[step][row, position].any():
                    assert_equal_logits(logits[row, place], seen[step][row, position])
                    compared += 1
    assert compared > 3 * 8 * 2


def test_the_loss_is_that_of_rows_in_which_the_numbers_before_are_hidden(policy):
    """Each number's tokens, and what ends it; beside them the separators and the end of the trunk."""
    batch, rng = observations(2, seed=5), np.random.default_rng(0)
    numbers = rng.integers(0, 512, (2, 8))
    numbers[:, 2:4] = [[7, 48], [0, 511]]  # of one digit, of two, of three
    collator, inputs = branched_batch(policy, batch, numbers)
    chat, vocabulary = policy.chat_tokenizer, policy.model.get_output_embeddings().weight.shape[0]
    labels = inputs["labels"]
    with torch.no_grad():
        scores = policy.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.log_softmax(-1)
    for row in range(2):
        places = places_of(collator, inputs, row, numbers[row])
        for position, own in enumerate(places):
            hidden = np.arange(8) < position
            answer, _ = chat.encode_answer(numbers[row], hidden)
            first, plain = row_logits(policy, batch[row], numbers[row], hidden, range(vocabulary))
            _, roots = collator.branched.trunk(numbers[row], hidden)
            expected = torch.from_numpy(plain).log_softmax(-1)
            for step, place in enumerate(own):
                target = answer[roots[position] + step + 1]
                assert labels[row, place + 1] == target
                ours, theirs = scores[row, place, target], expected[first + roots[position] + step, target]
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        counted = (labels[row] != IGNORED).sum().item()
        main, branches = chat.encode_answer(numbers[row], np.ones(8, bool))[1], sum(map(len, places))
        assert counted == sum(label != IGNORED for label in main) + branches


def test_gradients_reach_the_prompt_the_trunk_before_and_the_own_digits_alone(policy):
    numbers = np.full((1, 8), 345)
    collator, inputs = branched_batch(policy, observations(1, seed=7), numbers)
    places = places_of(collator, inputs, 0, numbers[0])
    embedded = []
    policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: embedded.append(output.requires_grad_()) or output
    )
    logits = policy.model(**inputs).logits[0]
    for position in (0, 3, 7):
        last = places[position][-1]
        (gradient,) = torch.autograd.grad(logits[last].logsumexp(-1), embedded[0], retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        images = inputs["input_ids"][0] == policy.chat_tokenizer.image_token_id  # pixels stand there
        expected = torch.zeros_like(reached)
        expected[: places[position][0] + 1] = True
        expected[places[position][1:]] = True
        assert torch.equal(reached[~images], expected[~images])


def test_rows_without_branches_are_as_they_were(policy):
    """The same ids, labels and logits, beside rows that have some."""
    batch, numbers = observations(6, seed=9), np.random.default_rng(1).integers(0, 512, (6, 8))
    options = {"mask_max": 0.0, "mask_branches": 0.5}
    _, inputs = branched_batch(policy, batch, numbers, **options)
    _, plain = branched_batch(policy, batch, numbers, mask_max=0.0, mask_branches=0.0)
    assert plain.keys() == inputs.keys() - {"position_ids", "branches"}
    length, without = plain["input_ids"].shape[1], []
    with torch.no_grad():
        ours, theirs = (policy.model(**batch).logits.numpy() for batch in (inputs, plain))
    for row in range(6):
        if (inputs["input_ids"][row] != policy.chat_tokenizer.mask_id).all():
            without.append(row)
            for key in ("input_ids", "labels", "attention_mask"):
                assert torch.equal(inputs[key][row, :length], plain[key][row]), key
            size = plain["attention_mask"][row].sum()
            assert_equal_logits(ours[row, :size], theirs[row, :size])
    assert 0 < len(without) < 6
    _, evaluated = branched_batch(policy, batch, numbers, train=False, **options)
    assert evaluated.keys() == plain.keys()


def test_a_run_with_branches_learns_and_resumes(dot_dataset, tmp_path):
    options = {"mask_branches": 0.5, "max_steps": 4, "save_steps": 2, "learning_rate": 3e-3}
    whole = run(dot_dataset, tmp_path / "whole", **options)
    assert losses(whole)[-1] < losses(whole)[0]
    parts = tmp_path / "parts"
    run(dot_dataset, parts, **options | {"max_steps": 2})
    assert losses(run(dot_dataset, parts, **options)) == losses(whole)
    predicts(whole)


def test_what_branches_need_is_said(dot_dataset, tmp_path, example_config):
    with pytest.raises(SetupError, match="mask_branches needs attention that takes any mask: set attn_implementation"):
        run(dot_dataset, tmp_path / "eager", model={"attn_implementation": "eager"}, mask_branches=0.5)
    _, processor = build_nano(NanoConfig(**TINY, number_tokens=True), num_bins=511, texts=["Push it.\nState: "])
    with pytest.raises(ValueError, match=r"mask_branches=0.5: with one token per number .*: use mask_full"):
        VLADataCollator(processor, example_config, mask_branches=0.5)
    qwen = build_policy(QWEN)
    with pytest.raises(ValueError, match=r"mask_branches=0\.5: this model takes positions or attention from mm_token"):
        VLADataCollator(qwen.processor, qwen.config, mask_branches=0.5)
    with pytest.raises(ValueError, match=r"mask_max=0\.2 can't be honoured: mask_branches=1 hides all values"):
        run(dot_dataset, tmp_path / "all", mask_branches=1.0, mask_max=0.2)
