"""Fine-tune a vision-language model to drive an SO-100 or SO-101 by writing numbers, on recordings of your own.

LoRA on one 12 GB card in a night (README.md, "Your own robot in an afternoon"):

    python data_prep/convert_lerobot.py --source RECORDING --units degrees --chunk_size 30 --output_dir data/so100
    accelerate launch recipes/sft_so100.py

All weights, and any field of a recipe on the command line:

    accelerate launch recipes/sft_so100.py --config recipes/so100/full.yaml --dataset_name USER/NAME --max_steps 20000

The same command again continues where it was stopped. Fields: TRL's SFTConfig and ModelConfig, and those of
`vla0_trl/training/arguments.py`; `--help` lists them all. Any other arm of LeRobot's is trained like this, too.
"""

from pathlib import Path

from vla0_trl.training.fields import check_recipe_words

CONFIG = Path(__file__).parent / "so100" / "lora_12gb.yaml"

if __name__ == "__main__":
    check_recipe_words(CONFIG, __doc__)
    from vla0_trl.training.run import main  # after a look at the flags: torch and TRL take seconds

    main(CONFIG, __doc__)
