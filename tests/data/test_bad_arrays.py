"""HDF5 files and pictures from elsewhere that are damaged or malicious: one line, soon, in little memory."""

import io
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from support.general import load_script, short_words
from support.lerobot_files import replace_column, rewrite

from vla0_trl.data.episodes import Episode, EpisodeError, raw_rows
from vla0_trl.data.sources.lerobot_meta import read_meta
from vla0_trl.data.sources.libero_hdf5 import LiberoDemos
from vla0_trl.data.staging import ConversionError

FRAMES = 6
_RNG = np.random.default_rng(0)
DEMO = {
    "actions": np.hstack([_RNG.uniform(-1, 1, (FRAMES, 6)), np.ones((FRAMES, 1))]),
    "states": _RNG.normal(size=(FRAMES, 20)),
    "obs/ee_states": _RNG.normal(size=(FRAMES, 6)),
    "obs/gripper_states": _RNG.normal(size=(FRAMES, 2)),
    "obs/joint_states": _RNG.normal(size=(FRAMES, 7)),
    "obs/agentview_rgb": _RNG.integers(0, 255, (FRAMES, 16, 16, 3), np.uint8),
    "obs/eye_in_hand_rgb": _RNG.integers(0, 255, (FRAMES, 16, 16, 3), np.uint8),
}


@pytest.fixture
def hdf5(tmp_path) -> Path:
    path = tmp_path / "push_it_demo.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in DEMO.items():
            file[f"data/demo_0/{key}"] = values
    return path


def read(path: Path) -> None:
    episode = LiberoDemos([path], drop_noops=False).episode(0)
    for frames in episode.images.values():
        assert len(list(frames)) == len(episode.actions)


def elsewhere(group: h5py.Group, key: str) -> None:
    with h5py.File(Path(group.file.filename).with_name("other.h5"), "w") as other:
        other["x"] = DEMO[key]
    group[key] = h5py.ExternalLink("other.h5", "x")


def raw_bytes(group: h5py.Group, key: str) -> None:
    """Numbers that lie in any file of the machine."""
    values = DEMO[key]
    group.create_dataset(key, values.shape, values.dtype, external=[("/etc/passwd", 0, values.nbytes)])


def virtual(group: h5py.Group, key: str) -> None:
    layout = h5py.VirtualLayout(DEMO[key].shape, DEMO[key].dtype)
    layout[:] = h5py.VirtualSource("other.h5", "x", DEMO[key].shape)
    group.create_virtual_dataset(key, layout)


def large(group: h5py.Group, key: str) -> None:
    """6 × 60,000 × 60,000 pixels in a few kilobytes."""
    group.create_dataset(key, (FRAMES, 60_000, 60_000, 3), "u1", chunks=(6, 60_000, 1000, 3), compression="gzip")
    for column in range(60):
        group[key].id.write_direct_chunk((0, 0, column * 1000, 0), zlib.compress(b""))


def long(group: h5py.Group, key: str) -> None:
    group.create_dataset(key, (10**12, 7), "f4", chunks=(1000, 7))


VIEW = "obs/agentview_rgb"
DEMOS = [
    ("actions", None, "has no actions, it has"),
    ("actions", 3.0, "has no actions, it has"),
    ("actions", lambda group, key: group.create_group(key), "has no actions, it has"),
    ("actions", DEMO["actions"].astype("S8"), "actions is |S8 of shape (6, 7), wanted (frames, 7) numbers"),
    ("actions", DEMO["actions"][:, :6], "actions is float64 of shape (6, 6), wanted (frames, 7) numbers"),
    ("actions", DEMO["actions"][:, 0], "actions is float64 of shape (6,), wanted (frames, 7) numbers"),
    ("actions", DEMO["actions"].astype(complex), "actions is complex128"),
    ("actions", DEMO["actions"][:4], "actions has 4"),
    ("actions", DEMO["actions"][:0], "actions is of shape (0, 7), and holds nothing"),
    ("obs/ee_states", DEMO["obs/ee_states"][:, :0], "obs/ee_states is of shape (6, 0), and holds nothing"),
    ("actions", long, "at most 1000000 are read"),
    ("actions", elsewhere, "actions lies in another file"),
    ("obs/ee_states", None, "has no obs/ee_states"),
    ("obs/ee_states", DEMO["obs/ee_states"][:3], "has 3 frames, actions has 6"),
    ("obs/gripper_states", DEMO["states"], "wanted (frames, 2) numbers"),
    (VIEW, None, f"has no {VIEW}"),
    (
        VIEW,
        DEMO[VIEW][:, :, :, :2],
        "agentview_rgb is uint8 of shape (6, 16, 16, 2), wanted uint8 (frames, height, width, 3)",
    ),
    (VIEW, DEMO[VIEW].astype(np.float32), "agentview_rgb is float32"),
    (VIEW, DEMO[VIEW][:, 0], "agentview_rgb is uint8 of shape (6, 16, 3)"),
    (VIEW, large, "agentview_rgb has 60000×60000 pixels, at most 16777216 are read"),
    (VIEW, raw_bytes, "lies in another file"),
    (VIEW, virtual, "lies in another file"),
    (VIEW, lambda group, key: group.create_dataset(key, DEMO[key].shape, "u1"), "was never written"),
    (VIEW, lambda group, key: group.create_dataset(key, DEMO[key].shape, "u1", chunks=(2, 16, 16, 3)), "lacks blocks"),
]


@pytest.mark.parametrize(("key", "value", "message"), DEMOS, ids=short_words)
def test_a_demonstration_that_can_not_be_read(hdf5, key, value, message):
    with h5py.File(hdf5, "a") as file:
        group = file["data/demo_0"]
        del group[key]
        if callable(value):
            value(group, key)
        elif value is not None:
            group[key] = value
    with pytest.raises(EpisodeError) as error:
        read(hdf5)
    assert str(error.value).startswith(f"{hdf5}, demo_0") and "\n" not in str(error.value)
    found = "obs/ee_states has 6 frames, actions has 4" if message == "actions has 4" else message
    assert found in str(error.value)


@pytest.mark.parametrize("key", ["states", "obs/joint_states"])
@pytest.mark.parametrize("value", [None, 3.0, "x", np.zeros((6, 3)), np.zeros(6), np.zeros((3, 20))], ids=str)
def test_what_tells_when_pictures_were_taken_may_be_absent(hdf5, key, value):
    with h5py.File(hdf5, "a") as file:
        del file[f"data/demo_0/{key}"]
        if value is not None:
            file[f"data/demo_0/{key}"] = value
    read(hdf5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_an_hdf5_that_is_cut_off(hdf5, share):
    hdf5.write_bytes(hdf5.read_bytes()[: int(hdf5.stat().st_size * share)])
    with pytest.raises(EpisodeError, match="can't be read, it is absent, cut off or no HDF5"):
        read(hdf5)


# -- the card of a LeRobotDataset, of which the licence counts


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [mit]\n---\n", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "other"),
        ("---\nlicense: |\n  mit\n  configs: x\n---\n", "unknown"),
        ("---\nlicense: 3\n---\n", "unknown"),
        ("---\nlicense: {a: 1}\n---\n", "unknown"),
        ("---\n: : :\n---\n", "unknown"),
        ("---\n- a\n---\n", "unknown"),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", "unknown"),
        ("---\nlicense: !!python/object/apply:os.system [ls]\n---\n", "unknown"),
        ("no header", "unknown"),
        ("\0", "unknown"),
        ("", "unknown"),
    ],
    ids=lambda value: value[:40],
)
def test_the_licence_of_a_lerobot_dataset(v3, card, license):
    (v3 / "README.md").write_text(card)
    assert read_meta(v3).license == license


def test_links_out_of_meta_are_not_followed(v3):
    (v3 / "meta/stats.json").unlink()
    (v3 / "meta/stats.json").symlink_to("/etc/passwd")
    with pytest.raises(ConversionError, match=r"meta/stats.json leads to /etc/passwd, outside the dataset"):
        read_meta(v3)


# -- pictures


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, which its pixels, all black, would fill."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    return buffer.getvalue()


PICTURES = [
    (png_of(60_000, 60_000), "does not decode as PNG or JPEG (Image size (3600000000 pixels)"),
    (png_of(10_000, 10_000), "has 10000×10000 pixels, at most 16777216 are read"),
    (png_of(20_000_000, 1), "has 20000000×1 pixels"),
    (png_of(8, 8)[:40], "does not decode"),
    (png_of(0, 8), "does not decode"),
    (b"", "does not decode"),
    (gif(), "is GIF, expected PNG or JPEG"),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("data", "message"), PICTURES, ids=short_words)
def test_a_picture_that_is_none(data, message):
    from support.episodes import small_config

    config = small_config(cameras=["image"], state_dim=0, use_state=False)
    episode = Episode("go", np.zeros((1, 2), np.float32), {"image": [data]}, name="made up")
    with pytest.raises(EpisodeError) as error:
        list(raw_rows(episode, config, 0))
    assert str(error.value).startswith("made up, frame 0: camera 'image' ") and message in str(error.value)


def test_a_decompression_bomb_is_one_skipped_episode(v3, tmp_path, monkeypatch, capsys):
    from support.runs import run_main

    def spoil(table):
        images = table["observation.images.top"].to_pylist()
        images[7]["bytes"] = png_of(60_000, 60_000)
        return replace_column(table, "observation.images.top", [images])

    rewrite(v3 / "data/chunk-000/file-000.parquet", spoil)
    convert = load_script("data_prep/convert_lerobot.py")
    flags = ["--source", v3, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"^error: v3, episode 1, frame 2: camera 'top' does not decode .*\Z"):
        run_main(convert, monkeypatch, *flags)
    run_main(convert, monkeypatch, *flags, "--skip_bad_episodes")
    assert "6 episodes kept, 0 rejected" in capsys.readouterr().out
