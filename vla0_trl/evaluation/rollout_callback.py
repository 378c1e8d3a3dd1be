"""Rollouts in the simulator during training: the success rate as it grows, and the best policy so far."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
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
    return tuple(
        sum(float(r.get(key, r["success"])) for r in results) / len(results) for key in ("success", "max_coverage")
    )


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
