"""Fine-tune a vision-language model to drive PushT by writing numbers.

The full recipe (VLA-0-Smol's; one 24 GB GPU), on the human demonstrations:

    python data_prep/convert_pusht_zarr.py --source PATH/pusht_cchi_v7_replay.zarr --output_dir data/pusht_human
    accelerate launch recipes/sft_pusht.py

Another recipe, and any field of it on the command line:

    accelerate launch recipes/sft_pusht.py --config recipes/pusht/lora.yaml --dataset_name USER/DATASET --lora_r 32
    accelerate launch recipes/sft_pusht.py --config recipes/pusht/nano.yaml --dataset_name data/pusht --max_steps 200

The same command again continues where it was stopped. Fields: TRL's SFTConfig and ModelConfig, and those of
`vla0_trl/training/arguments.py`; `--help` lists them all.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vla0_trl.training.fields import check_recipe_words

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from vla0_trl.training.trainer import VLATrainer

CONFIG = Path(__file__).parent / "pusht" / "full.yaml"


def in_simulator(trainer: "VLATrainer") -> "list[TrainerCallback]":
    """Callbacks that run episodes; the simulator is only imported by a run that needs it."""
    args = trainer.args
    if not (args.rollout_steps or args.dagger_steps):
        return []
    from vla0_trl.envs.pusht.env import PushTEnv, state_mode
    from vla0_trl.evaluation.callbacks import DaggerCallback, RolloutCallback

    mode = state_mode(trainer.vla_config.state_dim)
    callbacks = [RolloutCallback(trainer, lambda: PushTEnv(mode))] if args.rollout_steps else []
    if args.dagger_steps:
        from vla0_trl.data.pusht_rows import rows_from_states
        from vla0_trl.envs.pusht.teacher import PushTTeacher, mirror_states

        teacher, chunk_size = PushTTeacher.load(args.dagger_teacher), trainer.vla_config.chunk_size
        if teacher.sizes["chunk_size"] < chunk_size:
            raise ValueError(
                f"dagger_teacher={args.dagger_teacher} answers {teacher.sizes['chunk_size']} steps, chunk_size is "
                f"{chunk_size}: make one with data_prep/teach_pusht.py --chunk_size {chunk_size}"
            )

        def labelled(states):
            states[1::2] = mirror_states(states[1::2])  # the task is symmetric: what was visited counts for its mirror
            return rows_from_states(states, teacher, mode)

        callbacks.append(DaggerCallback(trainer, lambda: PushTEnv(mode), labelled))
    return callbacks


if __name__ == "__main__":
    check_recipe_words(CONFIG, __doc__)
    from vla0_trl.training.run import main  # after a look at the flags: torch and TRL take seconds

    main(CONFIG, __doc__, in_simulator)
