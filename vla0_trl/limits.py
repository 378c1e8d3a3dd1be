"""The lowest and highest value of every count, share, size and seed that a script or a recipe takes."""

import math
from typing import Any

_COUNT, _MAYBE_NONE, _SHARE, _SIZE, _SEED = (1, 10**9), (0, 10**9), (0, 1), (0, 10**10), (0, 2**32 - 1)
_HELD = (1, 10**5)  # of which a list is made
_NAMES = {
    _COUNT: """
        per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_alpha
        save_total_limit logging_steps eval_steps save_steps dataset_num_proc
        ddp_bucket_cap_mb pad_to_multiple_of dataloader_prefetch_factor max_steps
        max_episodes_per_task num_frames
        steps turns chunks num_rows
        max_mb max_connections requests samples_per_minute every
    """,
    _HELD: """
        rollout_episodes dagger_episodes round_episodes episodes_per_task num_episodes_per_task batch_size batch_sizes
        rows max_batch
    """,
    _MAYBE_NONE: """
        num_eval_episodes rollout_steps probe_steps dagger_steps warmup_steps eval_delay
        eval_accumulation_steps torch_empty_cache_steps ddp_timeout num_videos warmup jitter
        window_ms delays_ms task_id
    """,
    _SHARE: """
        mask_max mask_skip mask_full mask_branches label_smoothing_factor lora_dropout crop_ratio
        stop_at_token_accuracy dagger_fraction noise_fraction expert_mix
    """,
    _SIZE: """
        learning_rate muon_adamw_learning_rate weight_decay max_grad_norm adam_epsilon neftune_noise_alpha
        num_train_epochs timeout_s router_aux_loss_coef card_gib max_gb peak_tflops
    """,
    _SEED: "seed data_seed",
}
LIMITS = {name: limits for limits, names in _NAMES.items() for name in names.split()}
# Sizes of a policy: above the largest that is trained anywhere, and low enough that a typing error fills no memory.
LIMITS |= {"chunk_size": (1, 1000), "n_action_steps": (1, 1000), "ensemble_size": (1, 1000)}
LIMITS |= {"num_episodes": (1, 10**6), "num_envs": (1, 10**4), "num_proc": (1, 10**4), "width": (1, 2**14)}
LIMITS |= {"temperature": (0, 100), "ensemble_decay": (-100, 100)}
LIMITS |= {"num_clients": (1, 10**4), "image_side": (1, 4096), "port": (0, 2**16 - 1), "refine": (0, 1000)}
LIMITS |= {
    "dataloader_num_workers": (0, 1000),
    "num_workers": (0, 1000),
    "first_init_state": (0, 10**5),
    "lora_r": (1, 2**14),
}
LIMITS |= {"adam_beta1": (0, 0.999999999), "adam_beta2": (0, 0.999999999)}
LIMITS |= {"action_noise": (0, 512), "num_bins": (1, 2**16 - 1), "image_size": (1, 2048)}
_SHARE_OF_RUN = ("logging_steps", "eval_steps", "save_steps", "warmup_steps")  # below 1, in transformers


def check_limits(settings: dict[str, Any]) -> None:
    """`ValueError` for the first number among some settings that is outside of its name's limits, or not finite."""
    for name, setting in settings.items():
        for value in setting if isinstance(setting, list) else [setting]:
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            low, high = LIMITS.get(name, (-math.inf, math.inf))
            if name == "max_steps" and "num_train_epochs" in settings and value == -1:
                continue  # transformers' way to say that the epochs count
            if not math.isfinite(value):
                raise ValueError(f"--{name} {value} must be a finite number")
            if value < low and not (name in _SHARE_OF_RUN and value > 0):
                raise ValueError(f"--{name} {value} must be at least {low}")
            if value > high:
                raise ValueError(f"--{name} {value} must be at most {high}")
