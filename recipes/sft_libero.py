"""Fine-tune a vision-language model to drive LIBERO's robot arm by writing numbers.

The full recipe (VLA-0-Smol's), on the four suites' demonstrations from the Hub:

    python data_prep/convert_lerobot.py --source HuggingFaceVLA/libero --gripper sign --output_dir data/libero
    accelerate launch recipes/sft_libero.py

Another recipe, and any field of it on the command line:

    accelerate launch recipes/sft_libero.py --config recipes/libero/lora.yaml --dataset_name USER/DATASET --lora_r 16
    accelerate launch recipes/sft_libero.py --config recipes/libero/debug.yaml --max_steps 30

The same command again continues where it was stopped. Fields: TRL's SFTConfig and ModelConfig, and those of
`vla0_trl/training/arguments.py`; `--help` lists them all. Only dagger_steps needs the simulator.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vla0_trl.training.fields import check_recipe_words

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from vla0_trl.training.trainer import VLATrainer

CONFIG = Path(__file__).parent / "libero" / "full.yaml"


def in_simulator(trainer: "VLATrainer") -> "list[TrainerCallback]":
    """Callbacks that run episodes; the simulator is only imported by a run that needs it."""
    args = trainer.args
    if args.rollout_steps:
        raise ValueError("rollout_steps is for PushT: evaluate checkpoints with eval/eval_libero.py, set it to 0")
    if not args.dagger_steps:
        return []
    from vla0_trl.data.libero_rows import rows_from_states
    from vla0_trl.envs.libero.teacher import TeachingEnv, tasks_of_teacher
    from vla0_trl.evaluation.callbacks import DaggerCallback

    # as the dataset's rows are, of which the policy may take some cameras, in another order
    cameras, picture = trainer.eval_collator.stored_cameras, trainer.train_dataset[0]["images"][0]
    tasks = tasks_of_teacher(args.dagger_teacher)
    make_env = partial(TeachingEnv, tasks, cameras=cameras, render_size=picture.width)
    labelled = partial(rows_from_states, make_env=make_env, chunk_size=trainer.vla_config.chunk_size)
    return [DaggerCallback(trainer, make_env, labelled, num_envs=1)]


if __name__ == "__main__":
    check_recipe_words(CONFIG, __doc__)
    from vla0_trl.training.run import main  # after a look at the flags: torch and TRL take seconds

    main(CONFIG, __doc__, in_simulator)
