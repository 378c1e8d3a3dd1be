"""The policy on random weights: every answer is a chunk, whatever the checkpoint says of sampling."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.backbones import QWEN, SMOLVLM, TINY, observations, shrunk
from support.general import shared_path
from transformers import AutoModelForImageTextToText, GenerationConfig

from vla0_trl import VLAConfig, VLAPolicy
from vla0_trl.evaluation.rollout import rollout
from vla0_trl.models.loading import load_processor
from vla0_trl.models.nano import NanoConfig, build_nano


@pytest.fixture
def policy(example_config) -> VLAPolicy:
    """A random one, whose head is sharpened so that argmax is no toss-up between batch sizes."""
    model, _ = build_nano(NanoConfig(**TINY), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    _, processor = build_nano(NanoConfig(**TINY))
    return VLAPolicy(model.eval(), processor, example_config)


def save(policy: VLAPolicy, folder) -> None:
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder)
    policy.config.save_pretrained(folder)


def test_shapes_and_units(policy):
    chunks = policy.predict_action_chunk(observations(5))
    assert chunks.shape == (5, 3, 2) and chunks.dtype == np.float32
    assert ((chunks >= 0) & (chunks <= 511)).all() and np.array_equal(chunks, chunks.round())


def test_unequal_prompts_in_one_batch_do_not_disturb_each_other(policy):
    batch = observations(8)
    together = policy.predict_action_chunk(batch)
    alone = np.concatenate([policy.predict_action_chunk([observation]) for observation in batch])
    assert np.array_equal(together, alone)
    assert len({chunk.tobytes() for chunk in together}) > 1  # else the test would say nothing


def test_the_observation_reaches_the_model(policy):
    first, other = observations(2, seed=3)
    base = policy.predict_action_chunk([first])
    answers = []
    for field in ("images", "state", "task"):
        answers.append(policy._inputs([{**first, field: other[field]}]))
    inputs = policy._inputs([first])
    assert not torch.equal(answers[0]["pixel_values"], inputs["pixel_values"])
    assert all(not torch.equal(a["input_ids"], inputs["input_ids"]) for a in answers[1:])
    assert np.array_equal(base, policy.predict_action_chunk([first]))


def test_training_and_inference_build_the_same_prompt(policy):
    from vla0_trl import VLADataCollator

    (observation,) = observations(1)
    row = {
        "images": list(observation["images"].values()),
        "task": observation["task"],
        "raw_state": observation["state"],
        "raw_action": np.zeros(6),
    }
    batch = VLADataCollator(policy.processor, policy.config, train=False)([row])
    inputs = policy._inputs([observation])
    prompt = batch["input_ids"][batch["labels"] == -100]
    assert torch.equal(prompt, inputs["input_ids"][0])
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"])


def test_a_checkpoints_own_sampling_does_not_leak(policy, tmp_path):
    expected = policy.predict_action_chunk(observations(6))
    save(policy, tmp_path)
    GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=2, max_new_tokens=4, min_p=0.1
    ).save_pretrained(tmp_path)
    loaded = VLAPolicy.from_pretrained(tmp_path)
    for _ in range(2):
        assert np.array_equal(loaded.predict_action_chunk(observations(6)), expected)


def test_a_saved_policy_needs_nothing_else(policy, tmp_path):
    save(policy, tmp_path)
    loaded = VLAPolicy.from_pretrained(str(tmp_path))
    assert loaded.config == policy.config
    assert np.array_equal(loaded.predict_action_chunk(observations(3)), policy.predict_action_chunk(observations(3)))
    (tmp_path / "vla_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vla_config.json: not a dataset .* nor a checkpoint"):
        VLAPolicy.from_pretrained(tmp_path)


def test_weights_in_4_bits_answer_in_chunks_too(policy, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra [train8bit]")
    save(policy, tmp_path)
    loaded = VLAPolicy.from_pretrained(tmp_path, load_in_4bit=True)
    packed = [m for m in loaded.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert packed and all(m.weight.dtype == torch.uint8 and m.weight.quant_type == "nf4" for m in packed)
    chunks = loaded.predict_action_chunk(observations(3))
    loaded.decoder = None
    assert np.array_equal(chunks, loaded.predict_action_chunk(observations(3)))


def test_a_checkpoint_on_the_hub_is_fetched_whole(policy, tmp_path, monkeypatch):
    """The Hub itself is faked: what it would download is a folder here."""
    save(policy, tmp_path)
    asked = []
    monkeypatch.setattr(
        "vla0_trl.models.loading.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path)
    )
    monkeypatch.setattr("vla0_trl.config._download", lambda *_: tmp_path / "vla_config.json")
    loaded = VLAPolicy.from_pretrained("user/policy", revision="v1")
    assert asked == [(("user/policy",), {"revision": "v1"})]
    assert np.array_equal(loaded.predict_action_chunk(observations(2)), policy.predict_action_chunk(observations(2)))


def test_relative_chunks_count_from_each_rows_own_state(policy, example_config):
    relative = VLAPolicy(policy.model, policy.processor, example_config.replace(relative_actions=True))
    batch = observations(4)
    for observation, chunk, base in zip(
        batch, relative.predict_action_chunk(batch), policy.predict_action_chunk(batch), strict=True
    ):
        np.testing.assert_allclose(chunk, base + observation["state"], rtol=1e-6)


def test_select_action_replays_a_chunk_and_then_asks_again(policy):
    policy.config = policy.config.replace(n_action_steps=2)
    calls, predict = [], policy.predict_action_chunk
    policy.predict_action_chunk = lambda batch: calls.append(batch) or predict(batch)
    first, second, third = observations(3)
    actions = [policy.select_action(first), policy.select_action(second), policy.select_action(third)]
    assert [batch[0] is o for batch, o in zip(calls, (first, third), strict=True)] == [True, True]
    assert np.array_equal(actions[:2], predict([first])[0][:2]) and np.array_equal(actions[2], predict([third])[0][0])
    policy.reset()
    policy.select_action(second)
    assert calls[-1][0] is second


def test_stock_generate_gives_the_same_chunks(policy):
    batches = [observations(size, seed=size) for size in (1, 3, 1)]
    fast = [policy.predict_action_chunk(batch) for batch in batches]
    policy.decoder = None
    for batch, chunks in zip(batches, fast, strict=True):
        assert np.array_equal(policy.predict_action_chunk(batch), chunks)


@pytest.mark.parametrize("relative", [False, True])
def test_the_last_chunk_of_an_episode_is_a_draft_of_its_next(policy, relative):
    """In environment units: counted from another state, the same actions are other numbers."""
    policy = VLAPolicy(
        policy.model, policy.processor, policy.config.replace(relative_actions=relative, n_action_steps=1)
    )
    first, second = observations(2)
    drafts, encode = [], policy.action_tokenizer.to_integers
    policy.action_tokenizer.to_integers = lambda chunk, state: drafts.append((chunk, state)) or encode(chunk, state)
    (chunk,) = policy.predict_action_chunk([{**first, "episode": 7}])
    assert len(drafts) == relative
    if relative:  # nothing is known yet: it may stay where it is
        np.testing.assert_allclose(drafts[0][0], np.tile(first["state"], (3, 1)))
    drafts.clear()
    policy.predict_action_chunk([{**second, "episode": 8}, {**second, "episode": 7}])
    assert len(drafts) == 1 + relative
    np.testing.assert_array_equal(drafts[-1][0], chunk[[1, 2, 2]])
    np.testing.assert_array_equal(drafts[-1][1], second["state"])
    policy.reset()
    drafts.clear()
    policy.predict_action_chunk([{**second, "episode": 7}])
    assert len(drafts) == relative


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("chunk_size", 4), ("num_bins", 1000), ("cameras", ["front"]), ("use_state", False), ("image_size", 96)),
        ("relative_actions", True),
    ],
)
def test_what_a_policy_was_built_for_can_not_be_set(policy, name, value):
    before = policy.config
    with pytest.raises(ValueError, match=rf"^{name}=.*, but this policy was made for {name}="):
        policy.config = policy.config.replace(**{name: value})
    assert policy.config is before


def test_a_new_config_brings_its_own_codecs(policy, example_config):
    """Statistics and normalization: what the integers mean follows the config at once."""
    doubled = replace(example_config.action_stats, max=[1022.0, 1022.0])
    for changes in ({"action_stats": doubled}, {"normalization": [-1.0, 1.0]}):
        policy.config = example_config
        policy.predict_action_chunk(observations(2))
        policy.config = example_config.replace(**changes)
        built = VLAPolicy(policy.model, policy.processor, example_config.replace(**changes))
        chunks, expected = (each.predict_action_chunk(observations(2)) for each in (policy, built))
        assert np.array_equal(chunks, expected)


def test_drafts_outlive_batches_without_their_session_and_are_bounded(policy, monkeypatch):
    first, second, third = (o | {"episode": name} for name, o in zip("abc", observations(3), strict=True))
    chunk = policy.predict_action_chunk([first, second])[0]
    policy.predict_action_chunk([third])  # a batch without `a`
    assert np.array_equal(policy._sessions.last_chunk("a"), chunk)
    monkeypatch.setattr("vla0_trl.policy.sessions.MAX_SESSIONS", 2)
    policy.predict_action_chunk([first])
    assert list(policy._sessions._sessions) == ["c", "a"]  # `b` was silent for longest


@pytest.mark.parametrize(
    "execution", [{"n_action_steps": 2}, {"ensemble_size": 3, "ensemble_decay": 0.5}, {"ensemble_size": 2}]
)
def test_a_robot_executes_what_is_evaluated(policy, execution):
    class Camera:
        """An environment that shows one observation after another, whatever is done."""

        def reset(self, seed):
            self.actions, self.shown = [], iter(observations(8, seed=5))
            self.now = next(self.shown)

        def observe(self):
            return self.now

        def step(self, action):
            self.actions.append(action)
            self.now = next(self.shown, None)
            return self.now is None

        def result(self):
            return {"success": True}

    policy.config = policy.config.replace(gripper="sign", **{"n_action_steps": None, **execution})
    env = Camera()
    list(rollout(policy, [env], [0], progress=False))
    policy.reset()
    robot = [policy.select_action(observation) for observation in observations(8, seed=5)]
    np.testing.assert_array_equal(robot, env.actions)


def test_ensembling_asks_at_every_step_and_averages(policy):
    policy.config = policy.config.replace(ensemble_size=2)
    policy.reset()
    first, second = observations(2)
    chunks = policy.predict_action_chunk([first])[0], policy.predict_action_chunk([second])[0]
    assert np.array_equal(policy.select_action(first), chunks[0][0])
    np.testing.assert_allclose(policy.select_action(second), (chunks[0][1] + chunks[1][0]) / 2)


def test_observations_that_do_not_fit_raise(policy):
    (observation,) = observations(1)
    with pytest.raises(ValueError, match=r"lacks cameras \['image'\].*\['front'\]"):
        policy.predict_action_chunk([{**observation, "images": {"front": observation["images"]["image"]}}])
    with pytest.raises(ValueError, match="has none"):
        policy.predict_action_chunk([{**observation, "state": None}])
    with pytest.raises(ValueError, match="2 dimensions"):
        policy.predict_action_chunk([{**observation, "state": np.zeros(3)}])
    with pytest.raises(ValueError, match="finite"):
        policy.predict_action_chunk([{**observation, "state": np.array([0, np.nan])}])


@pytest.mark.parametrize("name", [SMOLVLM, QWEN])
def test_real_architectures_and_tokenizers_answer_in_chunks(name, example_config):
    torch.manual_seed(0)
    config: VLAConfig = example_config.replace(image_size=224 if name == QWEN else 128, cameras=["a", "b"])
    model = AutoModelForImageTextToText.from_config(shrunk(name)).eval()
    policy = VLAPolicy(model, load_processor(shared_path(f"data/models/{name}"), config), config)
    batch = observations(4, cameras=("a", "b"))
    chunks = policy.predict_action_chunk(batch)
    assert chunks.shape == (4, 3, 2) and np.isfinite(chunks).all()
    np.testing.assert_array_equal(chunks, np.concatenate([policy.predict_action_chunk([o]) for o in batch]))


def test_an_adapters_base_model_is_found_where_the_run_moved(tmp_path):
    from vla0_trl.models.fingerprint import base_model_of

    run = tmp_path / "moved"
    (run / "base_model").mkdir(parents=True)
    (run / "checkpoint-5").mkdir()
    for folder in (run, run / "checkpoint-5"):
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/base_model"}))
        assert base_model_of(folder) == str(run / "base_model")
    (run / "base_model").rmdir()
    with pytest.raises(FileNotFoundError, match="/gone/base_model is gone"):
        base_model_of(run)
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/model"}))
    assert base_model_of(run) == "org/model"
