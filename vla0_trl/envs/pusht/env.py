"""The PushT environment, as evaluation, recording and training-time rollouts all use it.

A round agent pushes a T-shaped block onto a target, seen from above. The task is from Florence et al., "Implicit
Behavioral Cloning" (2021), in the form of Chi et al., "Diffusion Policy" (2023); the simulator is gym-pusht.
"""

import os

import cv2
import numpy as np

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame prints a banner when it is first imported

from gym_pusht.envs.pusht import PushTEnv as GymPushTEnv

TASK = "Push the T-shaped block onto the T-shaped target."  # the task string of lerobot/pusht
CAMERA = "image"  # lerobot/pusht calls it observation.image
FPS = 10  # gym-pusht: metadata["render_fps"], its control rate
MAX_EPISODE_STEPS = 300  # gym-pusht: its registration of gym_pusht/PushT-v0
IMAGE_SIZE = 96  # px; gym-pusht: observation_width and observation_height; lerobot/pusht stores the same
WORKSPACE = 512  # px; gym-pusht: positions and actions lie in [0, 512]²
SUCCESS_COVERAGE = 0.95  # gym-pusht: success_threshold, the share of the target that the block must exceed
_INSTANT = 1e-6  # s, of simulated time in which nothing moves
# agent x, y as in lerobot/pusht's observation.state; with block x, y, angle as in diffusion policy's zarr `state`
STATE_MODES = {"agent": 2, "full": 5}
STATE_NAMES = ["agent_x", "agent_y", "block_x", "block_y", "block_angle"]
ACTION_NAMES = ["target_x", "target_y"]
UNITS = "pixels of a 512 × 512 workspace (full state: the block's angle in radians, too)"


def state_mode(state_dim: int) -> str:
    """Which of `STATE_MODES` a policy's state_dim means; without a state, any will do."""
    return {dim: mode for mode, dim in STATE_MODES.items()}.get(state_dim, "agent")


def check_speaks_pusht(config, name: str) -> None:
    """`ValueError` unless a checkpoint's `VLAConfig` has this environment's camera, actions and one of its states."""
    if config.cameras != [CAMERA] or config.action_dim != 2 or config.state_dim not in (0, *STATE_MODES.values()):
        raise ValueError(
            f"{name} is not for PushT: it has cameras {config.cameras}, action_dim={config.action_dim}, state_dim="
            f"{config.state_dim}; the simulator gives camera {CAMERA!r}, takes 2 dimensions and has states of "
            f"{sorted(STATE_MODES.values())}"
        )


def _stable(number: float) -> float:
    """A coverage without its last bits, which differ by run: pymunk keeps a body's shapes in an unordered set."""
    return round(float(number), 12)


def _shrunk(scene) -> np.ndarray:
    """uint8[96, 96, 3] of a `pygame.Surface`: gym-pusht's own image, three times as fast.

    gym-pusht copies the scene, turned and channel by channel, before it shrinks it; here the copy is of what is left.
    """
    pixels = np.frombuffer(scene.get_buffer(), np.uint8).reshape(*scene.get_size(), 4)
    red, green, blue = (shift // 8 for shift in scene.get_shifts()[:3])
    return cv2.resize(pixels, (IMAGE_SIZE, IMAGE_SIZE))[..., [red, green, blue]]


class PushTEnv:
    """One PushT episode after another, rendered only on request: drawing costs four times the physics.

    Args:
        state (`str`, *optional*): what `observe` gives as state: `"agent"` (x, y) or `"full"` (agent x, y, block x, y,
            angle), in pixels and radians.
    """

    def __init__(self, state: str = "agent", max_episode_steps: int = MAX_EPISODE_STEPS):
        if state not in STATE_MODES:
            raise ValueError(f"state is {state!r}; it must be one of {sorted(STATE_MODES)}")
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps is {max_episode_steps}; it must be at least 1")
        self.state = state
        self.max_episode_steps = max_episode_steps
        # obs_type "state" keeps gym-pusht from drawing at every step; `observe` draws instead
        self._env = GymPushTEnv(obs_type="state", observation_width=IMAGE_SIZE, observation_height=IMAGE_SIZE)
        self._done = True

    def reset(self, seed: int) -> None:
        """Start the episode of this seed: gym-pusht's own distribution of agent and block positions."""
        self._env.reset(seed=seed)
        self._begin()

    def reset_to(self, full_state: np.ndarray) -> None:
        """Start an episode from a state, at rest: [`full_state`] is then this one, up to the angle's turns.

        gym-pusht's own `reset_to_state` moves the block once more when it sets the angle after the position.
        """
        self._env._setup()  # a new space: nothing is left of the contacts before
        self._env._last_action = None
        self.place(full_state)
        self._begin()

    def place(self, full_state: np.ndarray) -> None:
        """Move agent and block of the episode that is under way, to draw them there; `reset_to` starts one there."""
        state = [float(value) for value in full_state]
        agent, block = self._env.agent, self._env.block
        agent.position = state[0:2]
        block.angle = state[4]  # before the position: the block turns about its centre of mass, not about its origin
        block.position = state[2:4]
        for body in (agent, block):
            body.velocity, body.angular_velocity = (0.0, 0.0), 0.0
            self._env.space.reindex_shapes_for_body(body)
        self._env.space.step(_INSTANT)  # finds what touches: the drawing marks it

    def _begin(self) -> None:
        self.steps = 0
        self.success = False
        self.coverage = self.max_coverage = _stable(self._env._get_coverage())  # absent from gym-pusht's reset info
        self._return = 0.0
        self._done = False

    @property
    def full_state(self) -> np.ndarray:
        """float64[5]: agent x, y, block x, y in pixels, and block angle in [0, 2π)."""
        return self._env.get_obs()

    def observe(self) -> dict:
        """What the policy sees now, drawn for this call: CAMERA is uint8[96, 96, 3]."""
        image = _shrunk(self._env._draw())
        state = self.full_state[: STATE_MODES[self.state]].astype(np.float32)
        return {"images": {CAMERA: image}, "state": state, "task": TASK}

    def step(self, action: np.ndarray) -> bool:
        """Hold one target position, float[2] in pixels, for a tenth of a second; whether the episode is over.

        Draws nothing. Like gym-pusht, this does not clip to the workspace.
        """
        if self._done:
            raise RuntimeError("the episode is over: call reset(seed) before step")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(
                f"the action of step {self.steps} is {action}; it must be two finite numbers, x and y in px"
            )
        _, reward, _, _, info = self._env.step(action)
        self.steps += 1
        self.success = bool(info["is_success"])
        self.coverage = _stable(info["coverage"])
        self.max_coverage = max(self.max_coverage, self.coverage)
        self._return += _stable(reward)
        self._done = self.success or self.steps >= self.max_episode_steps
        return self._done

    def frame(self) -> np.ndarray:
        """uint8[256, 256, 3]: the scene for a video, with a red cross at the last action, as gym-pusht draws it."""
        return self._env._get_img(self._env._draw(), 256, 256, render_action=True)

    def result(self) -> dict:
        """The episode so far: `{"success": bool, "max_coverage": float, "return": float, "steps": int}`.

        `return` is the sum of gym-pusht's rewards, coverage / 0.95 clipped to [0, 1] at every step.
        """
        found = {"success": self.success, "max_coverage": self.max_coverage}
        return found | {"return": self._return, "steps": self.steps}

    def close(self) -> None:
        """Release the simulator."""
        self._env.close()
