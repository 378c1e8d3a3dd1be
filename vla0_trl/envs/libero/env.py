"""The LIBERO simulator (Liu et al. 2023), as evaluation and recording both use it, by the rules of `protocol.py`.

An episode depends on its task and initial state alone, not on the episodes before it in the same process. What a
policy sees is what a plain loop around LIBERO's own environment gives, bit by bit where no fixture stands open (a test
compares them). An open drawer or door may be up to 1.3 cm off: in LIBERO's own loop that depends on what ran before.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vla0_trl.envs.libero import protocol, setup
from vla0_trl.envs.libero.perturb import Perturbation


class LiberoEnv:
    """One task. Only one of these may be open in a process: under OSMesa, two draw into each other's pictures.

    Args:
        suite (`str`), task_id (`int`): which task.
        cameras (`Sequence[str]`): which to give, by the names in `protocol.CAMERAS`.
        max_steps (`int`, *optional*): limit of an episode, without the settling; by default the suite's.
        assets_dir (`str`, *optional*): see [`setup.find_assets`].
        perturbation ([`Perturbation`], *optional*): what to change.
        render_size (`int`, *optional*, defaults to `IMAGE_SIZE`): px; at 128, LIBERO's own, drawing takes a third.
        sampled (`bool`, *optional*): begin where the task's own sampler places objects, drawn with the episode's
            seed, instead of at one of the 50 initial states: for training on other placements than evaluation's.

    `ValueError`: there is no such suite, task or camera. `LiberoError`: LIBERO can't run here.
    """

    def __init__(
        self,
        suite: str,
        task_id: int,
        cameras: Sequence[str] = protocol.DEFAULT_CAMERAS,
        max_steps: int | None = None,
        assets_dir: str | Path | None = None,
        perturbation: Perturbation | None = None,
        render_size: int = protocol.IMAGE_SIZE,
        sampled: bool = False,
    ):
        names = setup.task_names(suite)
        if not 0 <= task_id < len(names):
            raise ValueError(f"{suite} has tasks 0 to {len(names) - 1}, not {task_id}")
        unknown = set(cameras) - protocol.CAMERAS.keys()
        if unknown:
            raise ValueError(f"LIBERO has no cameras {sorted(unknown)}: they are called {sorted(protocol.CAMERAS)}")
        setup.prepare_simulator(assets_dir)
        from libero.libero.envs import OffScreenRenderEnv

        self.suite, self.task_id, self.cameras = suite, task_id, tuple(cameras)
        self.max_steps = max_steps or protocol.MAX_STEPS[suite]
        self.render_size, self.sampled = render_size, sampled
        self.perturbation = perturbation or Perturbation()
        self.task = self.perturbation.task(suite, task_id, setup.instruction(names[task_id]))
        self._states = setup.initial_states(suite, names[task_id])
        # ControlEnv.reset, of the wrapper, swallows every exception, Ctrl-C too: only what is inside is used
        try:
            self.simulator = OffScreenRenderEnv(
                bddl_file_name=str(setup.package_folder() / "bddl_files" / suite / f"{names[task_id]}.bddl"),
                control_freq=protocol.CONTROL_FREQUENCY,
                use_camera_obs=False,
                # The same model again instead of a new one from XML: seconds less an episode. What robosuite then
                # forgets to reset, `reset` does.
                hard_reset=False,
                horizon=self.max_steps + protocol.SETTLING_STEPS + 1,
            ).env
        except FileNotFoundError as error:
            raise setup.LiberoError(
                f"{suite} task {task_id} needs {error.filename}, which is missing: these are not all of LIBERO's "
                "assets, which come from the Hub if no folder is given"
            ) from error
        self.perturbation.change_model(self.simulator.sim.model)
        self._take_snapshots()
        self.seed = self.steps = 0
        self._done = True

    def _take_snapshots(self) -> None:
        """Remember the simulator's data at the moment at which robosuite's cameras would draw.

        That is not the end of a step but a few milliseconds before it: an observable is sampled when its own clock
        says so. So an observable of ours, in their place, copies the data; pictures are drawn from the copy.
        """
        from robosuite.utils.observables import Observable, sensor

        sim = self.simulator.sim
        drawn_from = self._drawn_from = SimpleNamespace()
        sim._render_context_offscreen.data = drawn_from

        @sensor(modality="snapshot")
        def snapshot(cache: dict[str, Any]) -> np.ndarray:
            drawn_from._data = copy.copy(sim.data._data)
            self._drawn: dict[str, np.ndarray] = {}
            return np.zeros(1)

        self.simulator.add_observable(Observable("snapshot", snapshot, sampling_rate=protocol.CONTROL_FREQUENCY))

    def reset(self, seed: int) -> None:
        """Begin at the task's initial state of this index, after the objects have settled."""
        from robosuite.utils.errors import RandomizationError

        if not self.sampled and not 0 <= seed < len(self._states):
            raise ValueError(f"{self.suite} task {self.task_id} has initial states 0 to {len(self._states) - 1}")
        self.seed = seed
        np.random.seed(protocol.SEED + seed)  # where fixtures stand; robosuite draws from the global generator
        while True:
            try:
                self.simulator.reset()
                break
            except RandomizationError:  # objects did not fit: the next draw, as LIBERO does
                continue
        for robot in self.simulator.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        # As ControlEnv.regenerate_obs_from_state does it, with the perturbation in between.
        sim = self.simulator.sim
        sim.set_state_from_flattened(sim.get_state().flatten() if self.sampled else self._states[seed])
        self.perturbation.change_state(self.simulator, np.random.default_rng([protocol.SEED, seed]))
        sim.forward()
        self.simulator._post_process()
        self.simulator._update_observables(force=True)
        for _ in range(protocol.SETTLING_STEPS):
            self._observed, *_ = self.simulator.step(protocol.SETTLING_ACTION)
        self.steps = 0
        self.success = self._done = False

    def observe(self) -> dict[str, Any]:
        """What the policy sees: `{"images": {camera: uint8[256, 256, 3]}, "state": float32[8], "task": str}`."""
        return {"images": self.pictures(), "state": self.robot_state(), "task": self.task}

    def robot_state(self) -> np.ndarray:
        """float32[8]: the end effector's position, its rotation as axis-angle, and the fingers' positions.

        As in openvla-oft's and LeRobot's datasets.
        """
        from robosuite.utils.transform_utils import quat2axisangle

        seen = self._observed
        rotation = quat2axisangle(seen["robot0_eef_quat"].copy())  # clips in place
        return np.concatenate([seen["robot0_eef_pos"], rotation, seen["robot0_gripper_qpos"]]).astype(np.float32)

    @property
    def simulator_state(self) -> np.ndarray:
        """float64[n], time, positions and velocities at the moment that `observe` draws; see `place`."""
        data = self._drawn_from._data
        return np.concatenate([[data.time], data.qpos, data.qvel])

    def place(self, simulator_state: np.ndarray) -> None:
        """Bring everything where it was, to draw it; the next episode begins with `reset`.

        `observe` draws where bodies were when the simulator's last substep began: 2 ms, at most 1 mm, apart.
        """
        sim = self.simulator.sim
        sim.set_state_from_flattened(simulator_state)
        sim.forward()
        self._drawn_from._data, self._drawn, self._done = copy.copy(sim.data._data), {}, True

    def pictures(self) -> dict[str, np.ndarray]:
        """uint8[render_size, render_size, 3] of each camera, as `observe` gives them."""
        return {name: self._draw(protocol.CAMERAS[name]) for name in self.cameras}

    def step(self, action: np.ndarray) -> bool:
        """Execute float[7], all finite; True when the episode is over, by success or by the limit."""
        if self._done:
            raise RuntimeError("the episode is over: call reset(seed) before step")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (protocol.ACTION_DIM,) or not np.isfinite(action).all():
            wanted = f"it must be {protocol.ACTION_DIM} finite numbers"
            raise ValueError(f"the action of step {self.steps} is {action}; {wanted}")
        self._observed, _, done, _ = self.simulator.step(action)
        self.steps += 1
        self.success = bool(done)
        self._done = self.success or self.steps >= self.max_steps
        return self._done

    def frame(self) -> np.ndarray:
        """uint8[256, 256, 3] for a video: the camera that looks at the scene, as the policy would see it."""
        scale = protocol.IMAGE_SIZE // self.render_size
        return self._draw(protocol.CAMERAS["image"]).repeat(scale, 0).repeat(scale, 1)

    def _draw(self, camera: str) -> np.ndarray:
        if camera not in self._drawn:
            sim = self.simulator.sim
            picture = sim.render(camera_name=camera, width=self.render_size, height=self.render_size)
            # of this picture alone: noise must not depend on how many others were drawn, for a video perhaps
            number = list(protocol.CAMERAS.values()).index(camera)
            rng = np.random.default_rng([protocol.SEED, self.seed, self.steps, number])
            self._drawn[camera] = self.perturbation.image(np.ascontiguousarray(picture[protocol.ROTATION]), rng)
        return self._drawn[camera]

    def result(self) -> dict[str, Any]:
        """The episode so far."""
        return {
            "suite": self.suite,
            "task_id": self.task_id,
            "init_state": self.seed,
            "success": self.success,
            "steps": self.steps,
        }

    def close(self) -> None:
        """Release the simulator."""
        self.simulator.close()


class LiberoTasks:
    """Any task of any suite, one after another, each a [`LiberoEnv`] with these settings: what a worker holds."""

    def __init__(self, **settings: Any):
        self._settings = settings
        self._env: LiberoEnv | None = None

    def open(self, suite: str, task_id: int) -> LiberoEnv:
        """The environment of this task: the one that is there, or else a new one in its place."""
        if self._env is not None and (self._env.suite, self._env.task_id) != (suite, task_id):
            self.close()
        if self._env is None:
            self._env = LiberoEnv(suite, task_id, **self._settings)
        return self._env

    def reset(self, seed: protocol.LiberoEpisode) -> None:
        """Start this episode."""
        self.open(seed.suite, seed.task_id).reset(seed.seed)

    def observe(self) -> dict[str, Any]:
        return self._env.observe()

    def step(self, action: np.ndarray) -> bool:
        return self._env.step(action)

    def frame(self) -> np.ndarray:
        return self._env.frame()

    def result(self) -> dict[str, Any]:
        return self._env.result()

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = None
