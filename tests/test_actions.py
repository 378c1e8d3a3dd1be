import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vla0_trl import ActionParseError, ActionTokenizer, NormStats
from vla0_trl.actions import Quantizer, parse_integers

STATS = NormStats.from_array(np.array([[-1.0, 10.0], [3.0, 20.0]]))


def test_statistics_of_many_batches_equal_numpy():
    values = np.random.default_rng(0).normal([0, 1e6], [1, 3], (5000, 2))
    stats = NormStats.from_batches(lambda: np.array_split(values, 7))
    assert stats.min == values.min(0).tolist() and stats.max == values.max(0).tolist() and stats.count == 5000
    np.testing.assert_allclose(stats.mean, values.mean(0), rtol=1e-9)
    np.testing.assert_allclose(stats.std, values.std(0), rtol=1e-6)
    cell = np.ptp(values, axis=0) / (1 << 16)
    for q, found in ((0.01, stats.q01), (0.99, stats.q99)):
        assert (abs(found - np.quantile(values, q, axis=0, method="inverted_cdf")) <= cell).all()
    assert NormStats.from_dict(vars(stats)) == stats


@given(arrays(np.float64, (3, 2), elements=st.floats(-100, 100)), st.sampled_from([1, 255, 511, 1000]))
def test_round_trip_is_half_a_bin_inside_and_clipped_outside(actions, num_bins):
    tokenizer = ActionTokenizer(STATS, num_bins, chunk_size=3)
    text = tokenizer.encode(actions)
    decoded = tokenizer.decode(text)
    clipped = actions.clip(STATS.min, STATS.max)
    assert (abs(decoded - clipped) <= (np.array(STATS.max) - STATS.min) / num_bins / 2 + 1e-5).all()
    assert decoded.dtype == np.float32 and tokenizer.encode(decoded) == text


def test_text_is_time_major_and_ends_of_the_range_are_0_and_num_bins():
    assert ActionTokenizer(STATS, 1000, chunk_size=2).encode(np.array([[-1, 20], [3, 15]])) == "0 1000 1000 500"


def test_relative_actions_count_from_the_state():
    deltas = NormStats.from_array(np.array([[-4.0, -4.0], [4.0, 4.0]]))
    tokenizer = ActionTokenizer(deltas, 8, chunk_size=1, relative=True)
    state = np.array([100.0, 200.0, 7.0])
    assert tokenizer.encode(np.array([[101, 196]]), state) == "5 0"
    np.testing.assert_array_equal(tokenizer.decode("5 0", state), [[101, 196]])
    with pytest.raises(ValueError, match="state"):
        tokenizer.decode("5 0")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1 2 3",
        "1  2",
        "1 2a",
        "-1 2",
        "+1 2",
        "1.0 2",
        "1 1001",
        "01 2",
        "1_0 2",
        "١ 2",
        "1\t2",
        "1, 2",
        "² 2",
    ],
)
def test_anything_else_is_a_parse_error(text):
    with pytest.raises(ActionParseError):
        ActionTokenizer(STATS, 1000, chunk_size=1).decode(text)


def test_white_space_around_is_ignored():
    assert parse_integers(" 1 2\n", 2, 9).tolist() == [1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_raises_and_names_the_place(bad):
    with pytest.raises(ValueError, match=r"index \(1, 0\)"):
        ActionTokenizer(STATS, 1000, chunk_size=2).encode(np.array([[1, 2], [bad, 2]]))


def test_wrong_shape_raises():
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        ActionTokenizer(STATS, 1000, chunk_size=2).encode(np.zeros((2, 3)))


def test_a_dimension_that_never_moves_means_its_value():
    flat = NormStats.from_array(np.array([[1.0, 5.0], [2.0, 5.0]]))
    quantizer = Quantizer(flat, 511)
    assert quantizer.encode([[1.0, 5.0], [2.0, 9.0]]).tolist() == [[0, 0], [511, 0]]
    assert quantizer.decode(np.array([[511, 0], [0, 511]])).tolist() == [[2, 5], [1, 5]]
    assert Quantizer(flat, 10, [0.0, 10.0]).encode([[1.0, 5.0]]).tolist() == [[1, 5]]
    rare = NormStats.from_array(np.array([[0.0]] * 999 + [[1.0]]))  # both quantiles are 0
    assert Quantizer(rare, 100, "quantile").encode([[0.0], [1.0]]).tolist() == [[0], [100]]


def test_waypoints_are_written_and_the_steps_between_interpolated():
    stats = NormStats.from_array(np.array([[0.0, 0.0], [100.0, 100.0]]))
    tokenizer = ActionTokenizer(stats, 100, chunk_size=5, written_steps=[0, 3, 4])
    actions = np.array([[10, 90], [1, 2], [3, 4], [40, 60], [50, 0]])
    assert tokenizer.encode(actions) == "10 90 40 60 50 0"
    assert tokenizer.decode("10 90 40 60 50 0").tolist() == [[10, 90], [20, 80], [30, 70], [40, 60], [50, 0]]
    batch = tokenizer.from_integers(np.array([[10, 90, 40, 60, 50, 0]] * 3))
    assert batch.shape == (3, 5, 2) and batch.dtype == np.float32
    with pytest.raises(ActionParseError, match="expected 6 integers, got 10"):
        tokenizer.decode("1 2 3 4 5 6 7 8 9 10")


def test_between_waypoints_a_gripper_keeps_its_last_value():
    stats = NormStats.from_array(np.array([[0.0, -1.0], [100.0, 1.0]]))
    tokenizer = ActionTokenizer(stats, 100, chunk_size=5, written_steps=[0, 3, 4], holds_last_dimension=True)
    assert tokenizer.decode("10 0 40 100 50 0").tolist() == [[10, -1], [20, -1], [30, -1], [40, 1], [50, -1]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_statistics_of_what_is_not_finite_are_refused(value):
    values = np.zeros((4, 2))
    values[2, 1] = value
    with pytest.raises(ValueError, match=f"dimension 1 of vector 2 is {value}, not a finite number"):
        NormStats.from_array(values)


@pytest.mark.parametrize("bounds", [[-np.inf, np.inf], [0.0, np.nan], [-3e38, 3e38], [1.0, 1.0]])
def test_a_range_that_is_not_finite_never_becomes_action_text(bounds):
    with pytest.raises(ValueError, match="normalization="):
        ActionTokenizer(STATS, 1000, 1, bounds)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_actions_relative_to_a_broken_state_are_not_handed_out(value):
    tokenizer = ActionTokenizer(STATS, 1000, 1, relative=True)
    with pytest.raises(ValueError, match=r"actions relative to the state .* are not finite"):
        tokenizer.decode("5 5", np.array([0.0, value]))


def test_the_widest_range_decodes_to_finite_actions():
    tokenizer = ActionTokenizer(STATS, 1000, 1, [-1.7e38, 1.7e38])
    assert np.isfinite(tokenizer.decode("0 1000")).all()
