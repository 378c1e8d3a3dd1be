"""Fine-tune a vision-language model to drive LIBERO's robot arm by writing numbers.

The full recipe (VLA-0-Smol's), on the four suites' demonstrations from the Hub:

    python data_prep/convert_lerobot.py --source HuggingFaceVLA/libero --gripper sign --output_dir data/libero
    accelerate launch recipes/sft_libero.py

Another recipe, and any field of it on the command line:

    accelerate launch recipes/sft_libero.py --config recipes/libero/lora.yaml --dataset_name USER/DATASET --lora_r 16
    accelerate launch recipes/sft_libero.py --config recipes/libero/debug.yaml --max_steps 30

The same command again continues where it was stopped. Fields: TRL's SFTConfig and ModelConfig, and those of
`vla0_trl/training/arguments.py`; `--help` lists them all. The simulator is not needed: eval/eval_libero.py has it.
"""

from pathlib import Path

from vla0_trl.training.fields import check_recipe_words

CONFIG = Path(__file__).parent / "libero" / "full.yaml"

if __name__ == "__main__":
    check_recipe_words(CONFIG, __doc__)
    from vla0_trl.training.run import main  # after a look at the flags: torch and TRL take seconds

    main(CONFIG, __doc__)
