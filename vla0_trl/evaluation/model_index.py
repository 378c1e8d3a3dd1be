"""Evaluations in the Hub's format for results, with n, interval, seeds and execution of each number."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from vla0_trl.evaluation.episode_log import RESULTS
from vla0_trl.manifest import read_json


def eval_results(folder: Path, checkpoint_hash: str) -> list[EvalResult]:
    """What the evaluation in `folder` found, as entries of a model card: success rate in percent, and coverage.

    `ValueError` if there are no results, or they are of another checkpoint than this hash's.
    """
    results = read_json(folder / RESULTS)
    if results is None:
        raise ValueError(f"{folder} has no {RESULTS}: an evaluation writes it when its last episode is done")
    if results["checkpoint_hash"] != checkpoint_hash:
        raise ValueError(f"{folder} is an evaluation of other weights ({results['checkpoint']}): evaluate these")
    found = [_entry(results, "success_rate", 100, "success in percent")]
    if "mean_max_coverage" in results:
        found.append(_entry(results, "mean_max_coverage", 1, "mean of the largest coverage"))
    return found


def _entry(results: dict[str, Any], metric: str, scale: float, name: str) -> EvalResult:
    protocol = results["protocol"]
    env, simulator = protocol["env"], protocol.get("simulator", "")
    suites = sorted({group.split(" ")[0] for group in results["seeds"] if group})
    low, high = (round(scale * bound, 4) for bound in results[f"{metric}_interval"])
    return EvalResult(
        task_type="robotics",
        dataset_type=env,
        dataset_name=" ".join([env, *suites]) + (f" ({simulator})" if simulator else ""),
        dataset_args={"seeds": _seeds(results["seeds"]), "execution": _execution(protocol)},
        metric_type=metric,
        metric_name=name,
        metric_value=round(scale * results[metric], 4),
        metric_args={"n": results["num_episodes"], "interval_95": [low, high]},
    )


def _seeds(groups: dict[str, list[int]]) -> str:
    ranges = {f"{low} to {high}" for low, high in groups.values()}
    tasks = f" of each of {len(groups)} tasks" if len(groups) > 1 else ""
    return ", ".join(sorted(ranges)) + tasks


def _execution(protocol: dict[str, Any]) -> str:
    drawn = f", drawn with temperature {protocol['temperature']}" if protocol.get("temperature") else ""
    if protocol["ensemble_size"] > 1:
        return f"mean of up to {protocol['ensemble_size']} overlapping answers{drawn}"
    return f"{protocol['n_action_steps']} steps of each answer{drawn}"
