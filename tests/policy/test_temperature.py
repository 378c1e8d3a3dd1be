"""Answers drawn with a temperature: softmax's distribution, the same tokens by every way of decoding, repeatable."""

import numpy as np
import pytest
import torch
from support.backbones import observations
from support.random_policies import BACKBONES, build_policy

from vla0_trl import VLAPolicy
from vla0_trl.policy.sessions import Sessions
from vla0_trl.policy.speculative import decoder as decoding
from vla0_trl.policy.speculative.options import DecodingOptions


@pytest.fixture(scope="module", params=BACKBONES)
def policy(request):
    return build_policy(request.param)


def drawn(policy, batch, temperature: float) -> np.ndarray:
    """Three chunks of each episode, (3, B, chunk, dim)."""
    policy.config = policy.config.replace(temperature=temperature)
    return np.stack([policy.predict_action_chunk(batch) for _ in range(3)])


def episodes(count: int, seed: int) -> list[dict]:
    return [o | {"episode": f"e{i}"} for i, o in enumerate(observations(count, seed=seed))]


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_every_way_of_decoding_draws_the_same(policy, temperature, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_CANDIDATES", {"cpu": 512})
    monkeypatch.setattr(decoding, "MAX_DRAFTED", {"cpu": 1024})
    batch = episodes(4, seed=2)
    policy.decoder.stats.drafted = 0
    fast = drawn(policy, batch, temperature)
    assert policy.decoding == "fast" and policy.decoder.stats.drafted
    stock = VLAPolicy(policy.model, policy.processor, policy.config, DecodingOptions(mode="stock"))
    assert np.array_equal(drawn(stock, batch, temperature), fast)
    # Not the greedy answers, and not the same ones again.
    assert not np.array_equal(fast[0], fast[1])
    assert not np.array_equal(drawn(policy, batch, 0.0)[0], fast[0])


def test_a_draw_depends_on_episode_and_chunk_alone(policy):
    batch = episodes(3, seed=3)
    together = drawn(policy, batch, 1.0)
    for place, observation in enumerate(batch):
        assert np.array_equal(drawn(policy, [observation], 1.0)[:, 0], together[:, place])
    other = [observation | {"episode": "another"} for observation in batch[:1]]
    assert not np.array_equal(drawn(policy, other, 1.0)[:, 0], together[:, 0])


def test_a_prefix_is_kept_and_what_follows_is_drawn(policy):
    (observation,) = episodes(1, seed=4)
    prefix = np.float32([[10, 500], [300, 7]])
    policy.config = policy.config.replace(temperature=2.0)
    first, second = (policy.predict_action_chunk([observation], [prefix])[0] for _ in range(2))
    assert np.array_equal(first[:2], prefix) and np.array_equal(second[:2], prefix)
    assert not np.array_equal(first, second)


def test_draws_have_softmaxs_distribution():
    logits, temperature, count = np.float32([1.0, 0.0, -0.5, 2.0]), 0.7, 4000
    keys = [f"episode {number}" for number in range(count)]
    noise = Sessions().noise(keys, keys, (2, 4))
    assert noise.dtype == np.float32 and not np.array_equal(noise[:, 0], noise[:, 1])
    chosen = (logits + temperature * noise[:, 0]).argmax(1)
    expected = torch.softmax(torch.tensor(logits) / temperature, 0).numpy()
    shares = np.bincount(chosen, minlength=4) / count
    assert (np.abs(shares - expected) < 3 * np.sqrt(expected * (1 - expected) / count)).all()


def test_parallel_decoding_refuses_a_temperature():
    policy = build_policy("nano")
    parallel = VLAPolicy(policy.model, policy.processor, policy.config, DecodingOptions(mode="parallel"))
    with pytest.raises(ValueError, match="with parallel decoding"):
        parallel.config = policy.config.replace(temperature=0.5)
    # A checkpoint's own temperature can be replaced after loading; as it is, it does not answer.
    config = policy.config.replace(temperature=0.5)
    parallel = VLAPolicy(policy.model, policy.processor, config, DecodingOptions(mode="parallel"))
    with pytest.raises(ValueError, match="with parallel decoding"):
        parallel.predict_action_chunk(observations(1))
    parallel.config = config.replace(temperature=0.0)
    assert parallel.predict_action_chunk(observations(1)).shape == (1, 4, 2)
