"""The LIBERO evaluation protocol: every constant that a score depends on, each with its source.

Where not said otherwise: as in moojink/openvla-oft (experiments/robot/libero/run_libero_eval.py), which openpi, VLA-0
and TinyVLA repeat. The simulator is not imported here.
"""

from typing import NamedTuple

# Liu et al., "LIBERO: Benchmarking Knowledge Transfer for Lifelong Robot Learning" (2023). The step limits are a
# little more than the longest demonstration of each suite: 193, 254, 270, 505 and 373 steps. LeRobot: 280 for spatial.
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
# the papers' column for each suite, in their order; "Avg" is the mean of the first four
COLUMNS = dict(zip(MAX_STEPS, ("Spatial", "Object", "Goal", "Long", "90"), strict=True))
NUM_TASKS = {suite: 90 if suite == "libero_90" else 10 for suite in MAX_STEPS}  # hf-libero: libero_suite_task_map
NUM_INIT_STATES = 50  # hf-libero: init_files/*/*.pruned_init, each float64[50, n]; the papers run all of them

IMAGE_SIZE = 256  # px; what the demonstrations were rendered again at for training; LIBERO's own are 128
RENDER_SIZES = (128, 256)
# Both cameras turned by 180° before anything else, as in the datasets: robosuite's frames begin with the lowest line
# (that is one flip), and OpenVLA's conversion mirrored them as well.
ROTATION = (slice(None, None, -1), slice(None, None, -1))
# A policy's camera -> the simulator's: the names of HuggingFaceVLA/libero (observation.images.image and .image2), and
# of physical-intelligence/libero (image, wrist_image).
CAMERAS = {"image": "agentview", "image2": "robot0_eye_in_hand", "wrist_image": "robot0_eye_in_hand"}
DEFAULT_CAMERAS = ("image", "image2")
_POSE = ["x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z"]
# Changes, each in [-1, 1] of the controller's range, and the gripper; the end effector's pose, and both fingers.
ACTION_NAMES = [*(f"delta_{name}" for name in _POSE), "gripper"]
STATE_NAMES = [*_POSE, "finger_left", "finger_right"]
ACTION_DIM, STATE_DIM = len(ACTION_NAMES), len(STATE_NAMES)
# What every dataset of LIBERO says of its vectors, for a [`VLAConfig`].
VECTORS = {"action_dim": ACTION_DIM, "state_dim": STATE_DIM, "action_names": ACTION_NAMES, "state_names": STATE_NAMES}
VECTORS |= {"gripper": "sign"}
CROP_RATIO = 230 / 256  # VLA-0-Smol's
# robosuite 1.4, OSC_POSE: output_max 0.05 m and 0.5 rad for an action of 1
UNITS = (
    "action: changes of the end effector's position and rotation (1 is 0.05 m or 0.5 rad), and the gripper (−1 open, "
    "+1 closed); state: position in metres, axis-angle in radians, the fingers' positions in metres"
)
GRIPPER_OPEN, GRIPPER_CLOSED = -1.0, 1.0  # robosuite: PandaGripper; executed as the sign of what is predicted

CONTROL_FREQUENCY = 20  # Hz; hf-libero: ControlEnv(control_freq=20)
SETTLING_STEPS = 10  # objects fall into place; these count against no limit
SETTLING_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, GRIPPER_OPEN)
# openpi's --seed and openvla-oft's; it decides where fixtures stand, which initial states do not hold: within a few
# millimetres to centimetres. They seed once, so that an episode there depends on all before it; here it is
# SEED + initial state at every reset, as in LeRobot.
SEED = 7

# It moves scores (LIBERO #88). 3.0.1 gets colours wrong, ≥ 3.8 drops objects through tables, ≥ 3.17 does not run.
TESTED_MUJOCO = "3.3.2"
PACKAGES = ("torch", "transformers", "hf-libero", "robosuite", "mujoco", "numpy")  # versions that a report names


class LiberoEpisode(NamedTuple):
    """Which episode: a suite, the task's id in it, and the index of the task's initial state (as `seed`)."""

    suite: str
    task_id: int
    seed: int


def select_episodes(suites: str, task_ids: str | None, num_episodes_per_task: int) -> list[LiberoEpisode]:
    """The episodes that `--suites a,b --task_ids 0,3 --num_episodes_per_task 50` name; else `ValueError`."""
    if num_episodes_per_task > NUM_INIT_STATES:
        raise ValueError(
            f"--num_episodes_per_task {num_episodes_per_task}: a task has {NUM_INIT_STATES} initial states, "
            "and a greedy policy does the same again from the same one"
        )
    episodes = []
    for suite in dict.fromkeys(suites.split(",")):
        if suite not in NUM_TASKS:
            raise ValueError(f"--suites {suite}: LIBERO has {', '.join(NUM_TASKS)}")
        chosen = range(NUM_TASKS[suite])
        if task_ids is not None:
            chosen = dict.fromkeys(int(word) if word.isdecimal() else -1 for word in task_ids.split(","))
        for task_id in chosen:
            if not 0 <= task_id < NUM_TASKS[suite]:
                raise ValueError(f"--task_ids {task_ids}: {suite} has tasks 0 to {NUM_TASKS[suite] - 1}")
            episodes += [LiberoEpisode(suite, task_id, seed) for seed in range(num_episodes_per_task)]
    return episodes
