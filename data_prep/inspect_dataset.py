"""Look at a chat dataset: a page or a picture of a few rows.

    python data_prep/inspect_dataset.py --dataset data/pusht --rows 8 --output page.html --png sheet.png
    python data_prep/inspect_dataset.py --dataset USER/NAME --rows 0,100 --model_name_or_path RUN --output page.html

The action text is decoded again and drawn onto the frame (PushT) or plotted. With a model (a backbone, a checkpoint,
or just the folder of a processor) the page also shows the prompt and what is trained on, token by token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.data.chat_dataset import load_chat_dataset
from vla0_trl.data.viewer import contact_sheet, html_page
from vla0_trl.models.loading import load_processor
from vla0_trl.processing.collator import VLADataCollator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a folder or a Hub id")
    parser.add_argument("--model_name_or_path", help="whose prompt and tokens to show; a checkpoint shows its own")
    parser.add_argument("--image_size", type=int, help="for a backbone that the dataset's does not fit")
    parser.add_argument("--rows", default="8", help="that many, evenly spaced, or 0,100,200 (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="PAGE.html")
    parser.add_argument("--png", type=Path, metavar="SHEET.png")
    args = parser.parse_args()
    if args.output is None and args.png is None:
        parser.error("say where to: --output PAGE.html, --png SHEET.png, or both")

    dataset, config = load_chat_dataset(args.dataset)
    rows = [dataset[index] for index in _row_indices(args.rows, len(dataset), parser)]
    if args.output is not None:
        collator = None
        if args.model_name_or_path is not None:
            collator = _collator(args.model_name_or_path, config, args.image_size)
        title = f"{args.dataset}: {len(rows)} of {len(dataset)} rows"
        args.output.write_text(html_page(rows, config, title, collator))
        print(f"page: {args.output}")
    if args.png is not None:
        contact_sheet(rows, config).save(args.png)
        print(f"picture: {args.png}")


def _row_indices(text: str, length: int, parser: argparse.ArgumentParser) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() for word in words):
        parser.error(f"--rows {text}: expected a number of rows or row numbers 0,100,200")
    if len(words) == 1:
        count = min(int(text), length)
        return np.linspace(0, length - 1, count).astype(int).tolist()
    rows = [int(word) for word in words]
    if max(rows) >= length:
        parser.error(f"--rows {text}: the dataset has rows 0 to {length - 1}")
    return rows


def _collator(name_or_path: str, dataset_config: VLAConfig, image_size: int | None) -> VLADataCollator:
    """As in training: with a checkpoint's own config, if it has one."""
    config = dataset_config
    if (Path(name_or_path) / CONFIG_NAME).is_file():
        config = VLAConfig.from_pretrained(name_or_path)
    if image_size is not None:
        config = config.replace(image_size=image_size)
    return VLADataCollator(load_processor(name_or_path, config), config, stored_cameras=dataset_config.cameras)


if __name__ == "__main__":
    main()
