"""Making PushT's teacher, from nothing: the expert's episodes, a fit, DAgger with the expert, and its success.

All of it is in one folder and goes on where it was stopped:

    settings.json                   what it was begun with
    episodes/seeds-*.npz            the expert's episodes, `SEEDS_PER_FILE` seeds each
    recoveries/round-*.npz          the expert's ways to the goal from where the teacher had come to
    visited/round-*.npz             the teacher's own episodes
    fit.safetensors                 the fit as it stands
    teacher.safetensors, .json      the teacher, when it is done, and its success
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vla0_trl.envs.pusht.driving import StateEpisode, drive, record_states, recover
from vla0_trl.envs.pusht.fitting import FitSettings, TeacherData, TeacherFit
from vla0_trl.envs.pusht.teacher import CHUNK_SIZE, PushTTeacher, through_waypoints
from vla0_trl.files import whole_file, write_whole
from vla0_trl.process_pool import ProcessPool
from vla0_trl.run_folder import differences

SEEDS_PER_FILE = 50
# Seeds of episodes, so that none is in two of them; the fit's own seed times SEED_STRIDE is added to the first two.
EXPERT_SEEDS, DAGGER_SEEDS, REPORT_SEEDS = 300_000, 2_000_000, 4_000_000
SEED_STRIDE, ROUND_STRIDE = 10_000, 1_000
SAVE_STEPS = 2_000
SLOW = 150  # steps of a successful episode from which on it counts as a struggle; the expert takes 80


@dataclass
class TeachSettings:
    """How a teacher is made; `rounds` are steps of the fit at which it drives and the expert shows the ways back."""

    num_episodes: int = 1_200  # seeds that the expert tries
    action_noise: float = 5.0  # px, in this share of its episodes:
    noise_fraction: float = 0.6
    rounds: list[int] = field(default_factory=lambda: [10_000, 15_000, 20_000, 25_000, 30_000])
    round_episodes: int = 300
    chunk_size: int = CHUNK_SIZE  # steps that it answers at once
    fit: FitSettings = field(default_factory=FitSettings)


def teach(folder: Path, settings: TeachSettings, num_proc: int = 1) -> PushTTeacher:
    """Make the teacher, or go on with it; it ends in `folder`/teacher.safetensors.

    The expert drives in `num_proc` processes. `ValueError` if the folder was begun with other settings.
    """
    asked, path = asdict(settings), folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        for changed in differences(json.loads(path.read_text()), asked):
            raise ValueError(f"{folder} was begun with other settings ({changed}): choose another folder")
    write_whole(path, json.dumps(asked, indent=1) + "\n")
    data = TeacherData(settings.chunk_size)
    with _each_in_parallel(num_proc) as run_each:
        data.add(_expert_episodes(folder, settings, run_each))
        fit = TeacherFit(settings.fit, data)
        if (folder / "fit.safetensors").exists():
            fit.load(folder / "fit.safetensors")
        for number, step in enumerate(settings.rounds):
            if step < fit.done:  # its ways are in the data that the fit goes on with
                data.add(load_episodes(_round_file(folder, "recoveries", number)))
        with tqdm(total=settings.fit.steps, initial=fit.done, desc="fitting", unit="step") as bar:
            while fit.done < settings.fit.steps:
                if fit.done in settings.rounds:
                    fit.save(folder / "fit.safetensors")
                    number = settings.rounds.index(fit.done)
                    bar.set_postfix_str(_dagger_round(folder, fit, number, settings, run_each))
                fit.step()
                bar.update()
                if fit.done % SAVE_STEPS == 0:
                    fit.save(folder / "fit.safetensors")
    fit.save(folder / "fit.safetensors")
    fit.teacher.eval().save(folder / "teacher.safetensors", asked)
    return fit.teacher


def success(teacher: PushTTeacher, num_episodes: int, first_seed: int = REPORT_SEEDS) -> dict[str, Any]:
    """How often the teacher succeeds, executed whole, by halves, and through waypoints as a policy may write them."""
    size = teacher.sizes["chunk_size"]
    ways = {f"{steps} of {size} steps": (teacher.label, steps) for steps in (size, size // 2)}
    for share in ([0, 3 / 7, 1], [0, 2 / 7, 4 / 7, 1]):  # of a policy's waypoints, such as [0, 3, 7] and [0, 2, 4, 7]
        written = sorted({round((size - 1) * part) for part in share})
        name = f"waypoints {', '.join(map(str, written))}"
        ways[name] = (lambda states, written=written: through_waypoints(teacher.label(states), written), size)
    result: dict[str, Any] = {"num_episodes": num_episodes, "first_seed": first_seed}
    for way, (policy, n_action_steps) in tqdm(ways.items(), desc="measuring", unit="way"):
        episodes = drive(policy, range(first_seed, first_seed + num_episodes), n_action_steps)
        result[way] = {
            "success_rate": float(np.mean([episode.success for episode in episodes])),
            "mean_max_coverage": float(np.mean([episode.max_coverage for episode in episodes])),
            "mean_steps": float(np.mean([len(episode.states) for episode in episodes])),
        }
    return result


def state_pool(folder: Path) -> np.ndarray:
    """float32[N, 5]: all states that the expert and the teacher came to while the teacher in `folder` was made."""
    files = [path for part in ("episodes", "recoveries", "visited") for path in sorted((folder / part).glob("*.npz"))]
    if not files:
        raise FileNotFoundError(f"{folder} has no episodes: make a teacher there with data_prep/teach_pusht.py")
    return np.concatenate([episode.states for path in files for episode in load_episodes(path)])


def save_episodes(path: Path, episodes: list[StateEpisode]) -> None:
    """Write episodes as one file of arrays; there may be none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "states": np.concatenate([np.zeros((0, 5), np.float32), *(episode.states for episode in episodes)]),
        "actions": np.concatenate([np.zeros((0, 2), np.float32), *(episode.actions for episode in episodes)]),
        "lengths": np.array([len(episode.states) for episode in episodes], np.int64),
        "success": np.array([episode.success for episode in episodes], bool),
        "max_coverage": np.array([episode.max_coverage for episode in episodes], np.float64),
    }
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def load_episodes(path: Path) -> list[StateEpisode]:
    """The inverse of [`save_episodes`]."""
    with np.load(path, allow_pickle=False) as file:
        ends = np.cumsum(file["lengths"])[:-1]
        parts = [np.split(file[name], ends) for name in ("states", "actions")]
        parts += [file["success"], file["max_coverage"]]
        return [StateEpisode(*episode) for episode in zip(*parts, strict=True)] if len(file["lengths"]) else []


# a function of one argument, arguments, what is done -> the results in order, with a progress bar
_RunEach = Callable[[Callable, Sequence, str], Iterator]


def _expert_episodes(folder: Path, settings: TeachSettings, run_each: _RunEach) -> list[StateEpisode]:
    """The expert's successful episodes; those without a file are recorded."""
    first = EXPERT_SEEDS + SEED_STRIDE * settings.fit.seed
    record = partial(_record, noise=settings.action_noise, fraction=settings.noise_fraction)
    starts = range(first, first + settings.num_episodes, SEEDS_PER_FILE)
    successful = []
    for start in starts:
        stop = min(start + SEEDS_PER_FILE, first + settings.num_episodes)
        path = folder / "episodes" / f"seeds-{start}-{stop - 1}.npz"
        if not path.exists():
            name = f"recording seeds up to {stop - 1} of {starts[0] + settings.num_episodes - 1}"
            episodes = run_each(record, range(start, stop), name)
            save_episodes(path, [episode for episode in episodes if episode.success])
        successful += load_episodes(path)
    return successful


def _record(seed: int, noise: float, fraction: float) -> StateEpisode:
    noisy = np.random.default_rng([seed, 1]).random() < fraction  # not the noise's own stream
    return record_states(seed, noise if noisy else 0.0)


def _dagger_round(folder: Path, fit: TeacherFit, number: int, settings: TeachSettings, run_each: _RunEach) -> str:
    """The teacher drives, the expert goes on from where it struggled, and that joins the data; says how it went."""
    visited, recoveries = (_round_file(folder, kind, number) for kind in ("visited", "recoveries"))
    if not recoveries.exists():
        first = DAGGER_SEEDS + SEED_STRIDE * settings.fit.seed + ROUND_STRIDE * number
        driven = drive(fit.teacher.label, range(first, first + settings.round_episodes))
        states = struggling_states(driven, np.random.default_rng([settings.fit.seed, first]))
        ways = list(run_each(recover, states, f"recovering, round {number + 1} of {len(settings.rounds)}"))
        save_episodes(visited, driven)
        save_episodes(recoveries, [way for way in ways if way.success])
    fit.data.add(load_episodes(recoveries))
    success_rate = np.mean([episode.success for episode in load_episodes(visited)])
    return f"round {number + 1}: success {success_rate:.1%}"


def struggling_states(episodes: list[StateEpisode], rng: np.random.Generator) -> list[np.ndarray]:
    """States to learn from: four of each failed episode, two of a slow one, one of three tenths of the others."""
    chosen = []
    for episode in episodes:
        count = 4 if not episode.success else 2 if len(episode.states) > SLOW else int(rng.random() < 0.3)
        chosen += list(episode.states[rng.integers(len(episode.states), size=count)])
    return chosen


def _round_file(folder: Path, kind: str, number: int) -> Path:
    return folder / kind / f"round-{number:02d}.npz"


@contextmanager
def _each_in_parallel(num_proc: int) -> Iterator[_RunEach]:
    """Processes to run functions in; with one, this one."""

    def shown(results: Iterator, arguments: Sequence, name: str) -> Iterator:
        return tqdm(results, name, len(arguments), unit="episode", leave=False)

    if num_proc == 1:
        yield lambda function, arguments, name: shown(map(function, arguments), arguments, name)
        return
    with ProcessPool(num_proc) as pool:
        yield lambda function, arguments, name: shown(pool.map(function, arguments), arguments, name)
