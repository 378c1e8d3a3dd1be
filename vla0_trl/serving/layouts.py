"""Which keys a robot's messages have, and how they become observations of the checkpoint. Nothing is guessed.

A layout is data: it names the keys of pictures, state and instruction. openpi's example clients (LIBERO, DROID, ALOHA)
have one each; a YAML file with the fields of [`Layout`] makes another. What a message lacks, and keys that nobody
knows, are an error that names both sides.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vla0_trl.envs.libero import protocol
from vla0_trl.schema import Kind, between, boolean, items, line_of_text, mapping, mistakes, optional, parse_yaml

MAX_LAYOUT_BYTES = 1 << 20
CAMERA = "{camera}"


@dataclass(frozen=True)
class Layout:
    """The keys of one robot's messages. `a/b` is the key "a/b", or "b" in the map "a".

    Args:
        images (`dict[str, list[str]]` or `str`): key -> the names that this camera may have in a checkpoint; or one
            key for any camera, such as "observation/{camera}".
        state (`list[str]`): keys whose numbers, joined in this order, are the state.
        task (`str`), default_task (`str`, *optional*): the instruction's key; the instruction if the key is absent.
        chunk_size (`int`, *optional*): actions that the client executes of each reply, which gets that many.
        needs_units (`bool`): the joints may be in degrees or in −100…100, and server and requests must say which.
        state_names, action_names (`list[str]`, *optional*): of each dimension, as the robot knows them.
    """

    images: dict[str, list[str]] | str
    state: list[str] = field(default_factory=list)
    task: str = "prompt"
    default_task: str | None = None
    chunk_size: int | None = None
    needs_units: bool = False
    state_names: list[str] | None = None
    action_names: list[str] | None = None


_SERVOS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
_JOINTS = [f"{servo}.pos" for servo in _SERVOS]
LAYOUTS = {
    "plain": Layout(f"observation/{CAMERA}", ["observation/state"]),
    # openpi: examples/libero/main.py; the camera at the wrist is called image2 in HuggingFaceVLA/libero
    "libero": Layout(
        {"observation/image": ["image"], "observation/wrist_image": ["wrist_image", "image2"]},
        ["observation/state"],
        state_names=protocol.STATE_NAMES,
        action_names=protocol.ACTION_NAMES,
    ),
    # the keys of LIBERO's client, as openpi's issue tracker recommends for your own robot
    "pusht": Layout(
        {"observation/image": ["image"]},
        ["observation/state"],
        default_task="Push the T-shaped block onto the T-shaped target.",
        action_names=["target_x", "target_y"],
    ),
    # openpi: examples/droid/main.py, which asserts chunks of shape (10, 8)
    "droid": Layout(
        {
            "observation/exterior_image_1_left": ["exterior_image_1_left", "exterior_1_left", "image"],
            "observation/wrist_image_left": ["wrist_image_left", "wrist_left", "wrist_image"],
        },
        ["observation/joint_position", "observation/gripper_position"],
        chunk_size=10,
        state_names=[*(f"joint_{n}" for n in range(7)), "gripper"],
    ),
    # openpi: examples/aloha_real, which sends no prompt, and aloha_sim; its broker executes 25 actions
    "aloha": Layout(
        {f"images/cam_{name}": [f"cam_{name}"] for name in ("high", "low", "left_wrist", "right_wrist")},
        ["state"],
        chunk_size=25,
    ),
    # LeRobot's SO-100 and SO-101: what robot.get_observation() gives
    "so100": Layout(CAMERA, _JOINTS, needs_units=True, state_names=_JOINTS, action_names=_JOINTS),
}


def load_layout(name: str) -> Layout:
    """One of `LAYOUTS`, or that of a YAML file.

    `ValueError`: no such layout or file, or the file's fields are not those of [`Layout`]; one line each.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ValueError(f"--layout {name} is no file, and none of {', '.join(LAYOUTS)}: name one, or a FILE.yaml")
    if path.stat().st_size > MAX_LAYOUT_BYTES:
        raise ValueError(f"{path}: has {path.stat().st_size} bytes: is it a layout?")
    found = parse_yaml(str(path), path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold fields such as images, state and task")
    known = [f.name for f in fields(Layout)]
    lines = [f"{key!r} is no field of a layout, which has {', '.join(known)}" for key in found if key not in known]
    kinds = {"images": _images} | {key: kind for key, kind in _KINDS.items() if key in found}
    if lines := lines + mistakes(found, kinds):
        raise ValueError("\n".join(f"{path}: {line}" for line in lines))
    return Layout(**{key: kind(found[key]) for key, kind in kinds.items()})


def _images(value: Any) -> dict[str, list[str]] | str:
    if isinstance(value, str):
        if value.count(CAMERA) != 1 or not value.isprintable():
            raise ValueError(f"one key with {CAMERA} in it, or a map of key to camera names")
        return value
    names = {line_of_text(key): [name] if isinstance(name, str) else name for key, name in mapping(value).items()}
    return {key: items(line_of_text, 1, 16)(cameras) for key, cameras in names.items()}


_KINDS: dict[str, Kind] = {
    "state": items(line_of_text, 0, 256),
    "task": line_of_text,
    "default_task": optional(line_of_text),
    "chunk_size": optional(between(1, 1000)),
    "needs_units": boolean,
    **dict.fromkeys(("state_names", "action_names"), optional(items(line_of_text, 1, 4096))),
}
