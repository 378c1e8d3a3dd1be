"""Seeing or memorising? LIBERO with one thing changed, deterministically, each with a severity.

The dimensions are those of LIBERO-Plus (Fei et al. 2025) and LIBERO-PRO (Zhou et al. 2025); the numbers are our own:
scores compare with our clean ones, not with theirs. What is random depends on the episode's initial state alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla0_trl.envs.libero.setup import instruction, task_names

CAMERA_SHIFT = 0.03  # m per severity: how far the camera that looks at the scene moves
LIGHT_STEP = 0.16  # share of the light that is lost with each severity
OBJECT_SHIFT = 0.015  # m per severity: how far everything that stands on the table or floor moves
NOISE_STEP = 10.0  # standard deviation of the pixels' noise per severity, of 255
# A chat needs some text, and policies have seen no empty one: this says nothing about any task.
NO_INSTRUCTION = "."
_ANGLES, _SEVERITIES = ("90", "180", "270"), ("1", "2", "3", "4", "5")
_WITH_SEVERITY, _INSTRUCTIONS = ("camera", "light", "objects", "noise"), ("other_task", "no_task")
NAMES = f"rotate:90|180|270, {', '.join(f'{name}:1–5' for name in _WITH_SEVERITY)}, {', '.join(_INSTRUCTIONS)}"


@dataclass(frozen=True)
class Perturbation:
    """What a test of robustness changes: by default nothing. Severities are 1 to 5; 0: this one is not changed.

    Attributes:
        rotate (`int`): degrees, a multiple of 90, by which every camera's picture is turned.
        camera (`float`): the camera that looks at the scene stands to the side and higher; its direction stays.
        light (`float`): less light from everywhere.
        objects (`float`): everything that stands there, furniture too, is moved the same way: what stands on what
            stays as it was.
        noise (`float`): Gaussian noise on every pixel.
        instruction (`str`, *optional*): `"other_task"`: the policy is told the next task; success is still this one's,
            and should become rare. `"no_task"`: it is told `NO_INSTRUCTION`.
    """

    rotate: int = 0
    camera: float = 0
    light: float = 0
    objects: float = 0
    noise: float = 0
    instruction: str | None = None

    def task(self, suite: str, task_id: int, task: str) -> str:
        """What the policy is told."""
        if self.instruction == "other_task":
            names = task_names(suite)
            return instruction(names[(task_id + 1) % len(names)])
        return NO_INSTRUCTION if self.instruction == "no_task" else task

    def change_model(self, model: Any) -> None:
        """Change robosuite's `MjModel`, once."""
        shift = self.camera * CAMERA_SHIFT * np.array([0.0, 0.8, 0.6])
        model.cam_pos[model.camera_name2id("agentview")] += shift
        headlight = model.vis.headlight
        lights = (model.light_diffuse, model.light_ambient, model.light_specular)
        for light in (*lights, headlight.diffuse, headlight.ambient, headlight.specular):
            light *= 1 - self.light * LIGHT_STEP

    def change_state(self, simulator: Any, rng: np.random.Generator) -> None:
        """Change the scene of an episode in robosuite's environment, before objects settle."""
        if not self.objects:
            return
        angle = rng.uniform(0, 2 * np.pi)
        shift = self.objects * OBJECT_SHIFT * np.array([np.cos(angle), np.sin(angle)])
        for item in simulator.objects_dict.values():
            qpos = simulator.sim.data.get_joint_qpos(item.joints[-1])
            qpos[:2] += shift
            simulator.sim.data.set_joint_qpos(item.joints[-1], qpos)
        for name in simulator.fixtures_dict:
            simulator.sim.model.body_pos[simulator.obj_body_id[name]][:2] += shift

    def image(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8[H, W, 3], upright -> what the policy sees."""
        if self.rotate:
            image = np.ascontiguousarray(np.rot90(image, self.rotate // 90))
        if self.noise:
            noise = rng.normal(0, self.noise * NOISE_STEP, image.shape)
            image = np.clip(image + noise, 0, 255).astype(np.uint8)
        return image


def parse_perturbation(text: str) -> Perturbation:
    """`"rotate:90"`, `"noise:3"`, `"no_task"`, … as `--perturb` takes them; without a number, the severity is 3."""
    name, colon, value = text.partition(":")
    if name in _INSTRUCTIONS and not colon:
        return Perturbation(instruction=name)
    if (name == "rotate" and value in _ANGLES) or (name in _WITH_SEVERITY and value in _SEVERITIES):
        return Perturbation(**{name: int(value)})
    if name in _WITH_SEVERITY and not colon:
        return Perturbation(**{name: 3})
    raise ValueError(f"--perturb {text}: there is {NAMES}")
