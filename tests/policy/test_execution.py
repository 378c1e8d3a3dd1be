"""Executing chunks: n steps of each, or the ensemble's average, by numbers worked out by hand."""

import numpy as np
import pytest

from vla0_trl import VLAConfig
from vla0_trl.policy.execution import ChunkExecutor, TemporalEnsembler

# Chunk k was predicted at step k; row j of it is for step k + j. The values say who predicted what: 10·k + j.
CHUNKS = [np.array([[10.0 * k + j, -(10.0 * k + j)] for j in range(3)], np.float32) for k in range(4)]


def _run(ensembler: TemporalEnsembler) -> list[list[float]]:
    return [ensembler.update(chunk).tolist() for chunk in CHUNKS]


def test_uniform_mean_of_the_overlapping_predictions():
    # step 0: 0; step 1: 1 and 10; step 2: 2, 11 and 20; step 3: chunk 0 has no row left: 12, 21 and 30
    assert _run(TemporalEnsembler(3, 3)) == [[0, 0], [5.5, -5.5], [11, -11], [21, -21]]


def test_ensemble_size_limits_the_overlap():
    assert _run(TemporalEnsembler(3, 2)) == [[0, 0], [5.5, -5.5], [15.5, -15.5], [25.5, -25.5]]


def test_an_ensemble_of_one_is_the_newest_prediction():
    assert _run(TemporalEnsembler(3, 1)) == [[0, 0], [10, -10], [20, -20], [30, -30]]


def test_decay_gives_the_oldest_the_largest_weight():
    # weights exp(−ln 2 · i), i = 0 the oldest: 1, ½, ¼
    actions = _run(TemporalEnsembler(3, 3, decay=float(np.log(2))))
    expected = [0, (1 + 10 / 2) / 1.5, (2 + 11 / 2 + 20 / 4) / 1.75, (12 + 21 / 2 + 30 / 4) / 1.75]
    np.testing.assert_allclose([action[0] for action in actions], expected, rtol=1e-6)
    np.testing.assert_allclose([action[1] for action in actions], np.negative(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"weights": "uniform"}, [1, 1, 1]),
        ({"weights": "vla0_v1"}, [0.5, 0.5, 1]),
        ({"weights": "vla0_v2"}, [0.25, 0.5, 1]),
        ({"decay": float(np.log(0.5))}, [0.25, 0.5, 1]),  # what the docstring says of version 2
        ({"decay": float(np.log(0.9))}, [0.81, 0.9, 1]),
    ],
)
def test_vla0s_released_weights_trust_the_newest_prediction(settings, weights):
    third = _run(TemporalEnsembler(3, 3, **settings))[2]  # of predictions 2, 11 and 20, the oldest first
    assert third[0] == pytest.approx(np.average([2, 11, 20], weights=weights))


@pytest.mark.parametrize("decay", [-1e4, 1e4, -1e300, 1e300])
def test_an_extreme_decay_picks_one_prediction_and_stays_finite(decay):
    newest, oldest = [20, -20], [2, -2]
    assert _run(TemporalEnsembler(3, 3, decay=decay))[2] == (newest if decay < 0 else oldest)


@pytest.mark.parametrize(
    ("execution", "expected"),
    [
        ({"n_action_steps": 2}, [[[0, 0], [1, -1]], [[10, -10], [11, -11]]]),
        ({"ensemble_size": 2}, [[[0, 0]], [[5.5, -5.5]]]),
        ({"ensemble_size": 2, "ensemble_decay": float(np.log(4))}, [[[0, 0]], [[2.8, -2.8]]]),
        ({"ensemble_size": 2, "ensemble_weights": "vla0_v1"}, [[[0, 0]], [[7, -7]]]),
        ({"ensemble_size": 2, "gripper": "sign"}, [[[0, -1]], [[5.5, -1]]]),
    ],
)
def test_a_config_says_what_is_executed_of_each_chunk(execution, expected):
    executor = ChunkExecutor(VLAConfig(action_dim=2, chunk_size=3, **execution))
    for _ in range(2):  # the second episode does not remember the first
        executor.reset()
        for chunk, actions in zip(CHUNKS, expected, strict=False):
            np.testing.assert_allclose(executor.actions(chunk), actions, rtol=1e-6)


def test_reset_forgets():
    ensembler = TemporalEnsembler(3, 3)
    ensembler.update(CHUNKS[0])
    ensembler.reset()
    action = ensembler.update(CHUNKS[2])
    assert action.tolist() == [20, -20]
    assert action.dtype == np.float32


@pytest.mark.parametrize(
    ("ensemble_size", "decay", "message"),
    [
        (4, None, "ensemble_size=4 must be between 1 and chunk_size=3"),
        (0, None, "ensemble_size=0 must be between 1 and chunk_size=3"),
        (1, 0.1, "ensemble_decay=0.1 weighs overlapping predictions, but ensemble_size=1"),
        (3, float("nan"), "ensemble_decay=nan must be a finite number"),
    ],
)
def test_impossible_settings_raise(ensemble_size, decay, message):
    with pytest.raises(ValueError, match=message):
        TemporalEnsembler(3, ensemble_size, decay)
    of_config = {0: "ensemble_size is 0, wanted a whole number", 3: "ensemble_decay is nan, wanted a number"}
    with pytest.raises(ValueError, match=of_config.get(ensemble_size, message)):
        VLAConfig(chunk_size=3, ensemble_size=ensemble_size, ensemble_decay=decay)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ensemble_size": 2, "ensemble_weights": "act"}, "ensemble_weights='act' must be one of uniform, vla0_v1"),
        ({"ensemble_weights": "uniform"}, "ensemble_weights=uniform weighs overlapping predictions, but"),
        (
            {"ensemble_size": 2, "ensemble_weights": "vla0_v1", "ensemble_decay": 0.1},
            "ensemble_decay=0.1 and ensemble_weights=vla0_v1 are two ways",
        ),
    ],
)
def test_named_weights_that_would_do_nothing_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        VLAConfig(**settings)


def test_a_chunk_of_another_length_raises():
    with pytest.raises(ValueError, match=r"expected a chunk of shape \(3, D\), got \(2, 2\)"):
        TemporalEnsembler(3, 2).update(np.zeros((2, 2)))
