"""Episodes during training: rollouts that choose the best policy, and DAgger, which adds what the policy came to.

DAgger (Ross et al. 2011): the policy drives, an expert labels what it saw, and the rows are added.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from trl import SFTTrainer

from vla0_trl.evaluation.env_runner import Environment, local_envs
from vla0_trl.evaluation.rollout import rollout
from vla0_trl.manifest import replace_folder
from vla0_trl.policy.policy import VLAPolicy
from vla0_trl.run_folder import BEST

# Rollouts during training choose checkpoints, so final evaluations use other seeds (eval_pusht.py starts at 100000).
ROLLOUT_SEED = 50_000
_NUM_ENVS = 16  # side by side
# No other command starts here: recordings count from 0, final evaluations from 100,000 and 3,000,000.
DAGGER_SEED = 20_000_000


def drive(
    trainer: SFTTrainer, make_env: Callable[[], Environment], num_envs: int, seeds: Sequence[int]
) -> tuple[float, float]:
    """Let the model in training act, once per seed, in `num_envs` environments side by side.

    Returns the success rate and the mean of the largest coverage, which is success where there is none.
    """
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    policy = VLAPolicy(model, trainer.processing_class, trainer.vla_config)
    try:
        with local_envs(make_env, num_envs) as envs:
            results = [episode.result for episode in rollout(policy, envs, seeds, progress=False)]
    finally:
        model.train()
    scores = ([float(r.get(name, r["success"])) for r in results] for name in ("success", "max_coverage"))
    return tuple(sum(values) / len(values) for values in scores)


class RolloutCallback(TrainerCallback):
    """Every `rollout_steps`, lets the policy act in the simulator, and keeps the best one as `output_dir/best`."""

    def __init__(self, trainer: SFTTrainer, make_env: Callable[[], Environment]):
        self.trainer, self.make_env = trainer, make_env
        self.num_envs = min(_NUM_ENVS, trainer.args.rollout_episodes)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError("rollout_steps needs the whole model in one process: evaluate sharded runs with eval/")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.rollout_steps:
            return
        score = (0.0, 0.0)
        if state.is_world_process_zero:
            seeds = range(ROLLOUT_SEED, ROLLOUT_SEED + args.rollout_episodes)
            score = drive(self.trainer, self.make_env, self.num_envs, seeds)
        names = ("rollout/success_rate", "rollout/mean_max_coverage")
        scores = self.trainer.accelerator.gather(torch.tensor([score], device=args.device))[0].tolist()
        self.trainer.log_beside_training(control, dict(zip(names, scores, strict=True)))
        earlier = [tuple(entry[name] for name in names) for entry in state.log_history[:-1] if names[0] in entry]
        if tuple(scores) > max(earlier, default=(-1.0, -1.0)):
            fresh = Path(args.output_dir, f"{BEST}.partial")
            self.trainer.save_policy(fresh)
            if args.should_save:  # in one step: a kill leaves the old one or the new one
                replace_folder(fresh, Path(args.output_dir, BEST))


class StateRecorder:
    """An environment that appends its `full_state`, float[S], at the start of an episode and after every step."""

    def __init__(self, env: Environment, states: list[np.ndarray]):
        self.env, self.states = env, states
        self.observe, self.frame, self.result, self.close = env.observe, env.frame, env.result, env.close

    def reset(self, seed: int) -> None:
        self.env.reset(seed)
        self.states.append(self.env.full_state)

    def step(self, action: np.ndarray) -> bool:
        done = self.env.step(action)
        if not done:
            self.states.append(self.env.full_state)
        return done


class DaggerCallback(TrainerCallback):
    """Every `dagger_steps`, drives `dagger_episodes` new episodes and adds the visited states, labelled, to training.

    Logs `dagger/success_rate`, `dagger/mean_max_coverage` and `dagger/rows`: the success of the policy as it grows, on
    seeds that it has never seen.

    Args:
        trainer ([`VLATrainer`]): whose policy drives; its `growing_rows` take what was seen.
        make_env: builds one environment; it has `full_state`.
        rows_from_states: states (N, S) -> N rows as `RAW_SCHEMA` has them, with images and the expert's chunks.
    """

    def __init__(
        self,
        trainer: SFTTrainer,
        make_env: Callable[[], Environment],
        rows_from_states: Callable[[np.ndarray], list[dict[str, Any]]],
        num_envs: int = 20,
    ):
        self.trainer, self.make_env, self.rows_from_states = trainer, make_env, rows_from_states
        self.num_envs = min(num_envs, trainer.args.dagger_episodes)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError("dagger_steps needs the whole model in one process: set dagger_steps=0 for sharded runs")

    def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
        rows = self.trainer.growing_rows
        if state.is_world_process_zero:
            rows.drop_rounds_after(state.global_step)
        self.trainer.accelerator.wait_for_everyone()
        rows.begin(state.global_step, len(train_dataloader))

    def on_step_end(self, args, state, control, **kwargs):
        # No round in the last tenth: the learning rate is nearly zero, and what comes then is hardly learnt.
        if state.global_step % args.dagger_steps or state.global_step > 0.9 * state.max_steps:
            return
        success, coverage = (0.0, 0.0)
        if state.is_world_process_zero:
            success, coverage = self._round(state.global_step)
        scores = torch.tensor([[success, coverage]], device=args.device)
        success, coverage = self.trainer.accelerator.gather(scores)[0].tolist()
        rows = self.trainer.growing_rows.load()
        if state.is_world_process_zero:
            tqdm.write(
                f"step {state.global_step} of {state.max_steps}: the policy succeeds in {success:.0%} of "
                f"{args.dagger_episodes} new episodes, mean coverage {coverage:.3f}; {rows} labelled rows added so far"
            )
        metrics = {"dagger/success_rate": success, "dagger/mean_max_coverage": coverage, "dagger/rows": rows}
        self.trainer.log_beside_training(control, metrics)

    def _round(self, step: int) -> tuple[float, float]:
        args, states = self.trainer.args, []
        first = DAGGER_SEED + step // args.dagger_steps * args.dagger_episodes
        seeds = range(first, first + args.dagger_episodes)
        scores = drive(self.trainer, lambda: StateRecorder(self.make_env(), states), self.num_envs, seeds)
        self.trainer.growing_rows.write_round(step, self.rows_from_states(np.stack(states)))
        return scores
