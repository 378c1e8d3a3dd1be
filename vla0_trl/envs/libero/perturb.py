"""Seeing or memorising? LIBERO with one thing changed, deterministically, each with a severity.

The dimensions are those of LIBERO-Plus (Fei et al. 2025) and LIBERO-PRO (Zhou et al. 2025); the numbers are our own:
scores compare with our clean ones, not with theirs. What is random depends on the episode's initial state alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla0_trl.envs.libero.env import LiberoEnv, Perturbation
from vla0_trl.envs.libero.setup import instruction, task_names

SEVERITIES = (1, 2, 3, 4, 5)
CAMERA_SHIFT = 0.03  # m per severity: how far the camera that looks at the scene moves
LIGHT_STEP = 0.16  # share of the light that is lost with each severity
OBJECT_SHIFT = 0.015  # m per severity: how far everything that stands on the table or floor moves
NOISE_STEP = 10.0  # standard deviation of the pixels' noise per severity, of 255
# A chat needs some text, and policies have seen no empty one: this says nothing about any task.
NO_INSTRUCTION = "."


@dataclass(frozen=True)
class Rotate(Perturbation):
    """Every camera's picture turned by a multiple of 90°."""

    degrees: int

    def image(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(image, self.degrees // 90))


@dataclass(frozen=True)
class MoveCamera(Perturbation):
    """The camera that looks at the scene stands to the side and higher, and looks in the old direction."""

    severity: int

    def change_model(self, model: Any) -> None:
        camera = model.camera_name2id("agentview")
        model.cam_pos[camera] += self.severity * CAMERA_SHIFT * np.array([0.0, 0.8, 0.6])


@dataclass(frozen=True)
class DimLight(Perturbation):
    """Less light from everywhere."""

    severity: int

    def change_model(self, model: Any) -> None:
        left = 1 - self.severity * LIGHT_STEP
        for light in (model.light_diffuse, model.light_ambient, model.light_specular):
            light *= left
        headlight = model.vis.headlight
        for light in (headlight.diffuse, headlight.ambient, headlight.specular):
            light *= left


@dataclass(frozen=True)
class OtherTask(Perturbation):
    """The next task's instruction instead of this one's; success is still this one's, and should become rare."""

    def task(self, suite: str, task_id: int, task: str) -> str:
        names = task_names(suite)
        return instruction(names[(task_id + 1) % len(names)])


@dataclass(frozen=True)
class NoTask(Perturbation):
    """No instruction: `NO_INSTRUCTION` in its place. What still succeeds was not told what to do."""

    def task(self, suite: str, task_id: int, task: str) -> str:
        return NO_INSTRUCTION


@dataclass(frozen=True)
class ShiftObjects(Perturbation):
    """Everything that stands there, furniture too, moved the same way: what stands on what stays as it was."""

    severity: int

    def change_state(self, env: LiberoEnv, rng: np.random.Generator) -> None:
        angle = rng.uniform(0, 2 * np.pi)
        shift = self.severity * OBJECT_SHIFT * np.array([np.cos(angle), np.sin(angle)])
        simulator = env.simulator
        for item in simulator.objects_dict.values():
            qpos = simulator.sim.data.get_joint_qpos(item.joints[-1])
            qpos[:2] += shift
            simulator.sim.data.set_joint_qpos(item.joints[-1], qpos)
        for name in simulator.fixtures_dict:
            simulator.sim.model.body_pos[simulator.obj_body_id[name]][:2] += shift


@dataclass(frozen=True)
class Noise(Perturbation):
    """Gaussian noise on every pixel."""

    severity: int

    def image(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = rng.normal(0, self.severity * NOISE_STEP, image.shape)
        return np.clip(image + noise, 0, 255).astype(np.uint8)


_WITH_SEVERITY = {"camera": MoveCamera, "light": DimLight, "objects": ShiftObjects, "noise": Noise}
_INSTRUCTIONS = {"other_task": OtherTask, "no_task": NoTask}
_ANGLES = (90, 180, 270)
NAMES = f"rotate:90|180|270, {', '.join(f'{name}:1–5' for name in _WITH_SEVERITY)}, {', '.join(_INSTRUCTIONS)}"


def parse_perturbation(text: str) -> Perturbation:
    """`"rotate:90"`, `"noise:3"`, `"no_task"`, … as `--perturb` takes them; a severity left out is 3.

    Raises:
        ValueError: there is none such.
    """
    name, colon, value = text.partition(":")
    if name in _INSTRUCTIONS and not colon:
        return _INSTRUCTIONS[name]()
    if name == "rotate" and value.isdecimal() and int(value) in _ANGLES:
        return Rotate(int(value))
    if name in _WITH_SEVERITY and (not colon or (value.isdecimal() and int(value) in SEVERITIES)):
        return _WITH_SEVERITY[name](int(value) if colon else 3)
    raise ValueError(f"--perturb {text}: there is {NAMES}")
