import json

import numpy as np
import pytest

from vla0_trl import NormStats, VLAConfig

STATS = NormStats.from_array(np.array([[0.0, 0.0], [1.0, 1.0]]))


def test_saved_and_loaded_is_the_same(tmp_path):
    config = VLAConfig(cameras=["a", "b"], state_dim=5, action_stats=STATS, normalization=[-1.0, 1.0], use_state=True)
    config.save_pretrained(tmp_path)
    assert VLAConfig.from_pretrained(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["vla_config.json"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_action_steps": 9}, "n_action_steps=9 is more than chunk_size=8"),
        ({"ensemble_size": 4, "n_action_steps": 5}, "would do nothing"),
        ({"ensemble_size": 9}, "ensemble_size=9 must be between 1 and chunk_size=8"),
        ({"use_state": True}, "state_dim=0"),
        ({"relative_actions": True, "state_dim": 1}, "relative_actions=False"),
        ({"crop_ratio": 0.0}, "crop_ratio"),
        ({"normalization": "minmax"}, "normalization='minmax'"),
        ({"cameras": []}, "cameras is .., wanted a list of 1 to 16 values"),
        ({"cameras": ["a", "a"]}, "duplicates"),
        ({"action_dim": 3, "action_stats": STATS}, "action_stats has 2 dimensions"),
        ({"chunk_size": 0}, "chunk_size is 0, wanted a whole number from 1 to 1000"),
        ({"gripper": "yes"}, "gripper"),
        ({"normalization": [-np.inf, np.inf]}, "finite numbers"),
        ({"normalization": [0.0, np.nan]}, "finite numbers"),
        ({"normalization": ["a", 1.0]}, "finite numbers"),
        ({"normalization": [-3e38, 3e38]}, "difference a finite float32"),
        ({"normalization": [0, 1e39]}, "difference a finite float32"),
        ({"normalization": [1.0, -1.0]}, "low < high"),
        ({"fps": np.nan}, "fps is nan, wanted a number above 0"),
        ({"fps": 0}, "fps is 0"),
        ({"crop_ratio": np.nan}, "crop_ratio"),
        ({"image_jitter": [0.1, 0.1, np.nan, 0.1]}, "image_jitter"),
        ({"image_jitter": [0.1, np.inf, 0.1, 0.1]}, "image_jitter"),
        ({"waypoints": [0, 3]}, "waypoints=.* from 0 to 7"),
        ({"waypoints": [1, 7]}, "waypoints"),
        ({"waypoints": [0, 4, 3, 7]}, "increasing"),
        ({"waypoints": []}, "waypoints is"),
    ],
)
def test_impossible_combinations_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        VLAConfig(**fields)


def test_execution_follows_chunk_and_ensemble():
    config = VLAConfig(chunk_size=8)
    assert config.n_action_steps == 8
    assert config.replace(chunk_size=4).n_action_steps == 4
    assert config.replace(ensemble_size=8).n_action_steps == 1
    assert config.replace(ensemble_size=8).replace(ensemble_size=1).n_action_steps == 8
    assert config.replace(n_action_steps=5).replace(chunk_size=6).n_action_steps == 5
    with pytest.raises(ValueError, match="would do nothing"):
        config.replace(n_action_steps=5).replace(ensemble_size=2)


def test_an_ensembles_weights_are_saved_and_go_with_the_ensemble(tmp_path):
    config = VLAConfig(ensemble_size=4, ensemble_decay=0.1)
    config.save_pretrained(tmp_path)
    assert VLAConfig.from_pretrained(tmp_path) == config
    assert config.replace(ensemble_size=2).ensemble_decay == 0.1
    assert config.replace(ensemble_size=1).ensemble_decay is None
    weighed = config.replace(ensemble_weights="vla0_v1")
    assert (weighed.ensemble_decay, weighed.ensemble_weights) == (None, "vla0_v1")
    assert weighed.replace(ensemble_decay=0.2).ensemble_weights is None
    with pytest.raises(ValueError, match="weighs overlapping predictions"):
        config.replace(ensemble_size=1, ensemble_decay=0.1)


def test_gripper_is_executed_as_its_sign():
    actions = np.array([[0.5, 0.2], [0.5, -0.1]])
    assert VLAConfig(gripper="sign").postprocess_actions(actions).tolist() == [[0.5, 1.0], [0.5, -1.0]]
    assert VLAConfig().postprocess_actions(actions) is actions


def test_a_folder_without_config_and_unknown_fields_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no vla_config.json"):
        VLAConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder 'no/such'"):
        VLAConfig.from_pretrained("no/such")
    (tmp_path / "vla_config.json").write_text(json.dumps({"chunk_sise": 3}))
    with pytest.raises(ValueError, match="chunk_sise"):
        VLAConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(normalization=[-np.inf, np.inf]), "normalization=.* finite numbers"),
        (lambda data: data["action_stats"]["max"].__setitem__(1, np.inf), "max of dimension 1 is inf"),
        (lambda data: data["action_stats"]["q01"].__setitem__(0, np.nan), "q01 of dimension 0 is nan"),
        (lambda data: data["action_stats"]["mean"].__setitem__(0, None), "mean of dimension 0 is None"),
        (lambda data: data["action_stats"].update(min=[-3e38, 0.0], max=[3e38, 1.0]), "dimension 0 runs from -3e"),
        (lambda data: data["action_stats"].update(std=[1.0]), "std has 1 dimensions, min has 2"),
        (lambda data: data["action_stats"].pop("q99"), "q99"),
        (lambda data: data.update(chunk_size=None), "chunk_size is null"),
    ],
)
def test_a_saved_config_whose_numbers_are_not_finite_is_refused(change, message, tmp_path):
    VLAConfig(action_stats=STATS).save_pretrained(tmp_path)
    path = tmp_path / "vla_config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        VLAConfig.from_pretrained(tmp_path)


def test_a_damaged_config_is_one_line(tmp_path):
    (tmp_path / "vla_config.json").write_text('{"chunk_size": ')
    with pytest.raises(ValueError, match=f"^{tmp_path}/vla_config.json: "):
        VLAConfig.from_pretrained(tmp_path)


def test_codecs_need_statistics():
    with pytest.raises(ValueError, match="no action_stats"):
        VLAConfig().action_tokenizer()
    with pytest.raises(ValueError, match="no state_stats"):
        VLAConfig(state_dim=2, use_state=True).state_quantizer()
    assert VLAConfig(state_dim=2).state_quantizer() is None
