"""Look at a chat dataset: a page or a picture of a few rows.

    python data_prep/inspect_dataset.py --dataset data/pusht --rows 8 --output page.html --png sheet.png
    python data_prep/inspect_dataset.py --dataset USER/NAME --rows 0,100 --model_name_or_path RUN --output page.html

The action text is decoded again and drawn onto the frame (PushT) or plotted. With a model (a backbone, a checkpoint,
or just the folder of a processor) the page also shows the prompt and what is trained on, token by token.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla0_trl.command_line import option, parse, user_errors
from vla0_trl.config import CONFIG_NAME, VLAConfig


@dataclass(kw_only=True)
class Arguments:
    dataset: str = option(help="a folder or a Hub id")
    model_name_or_path: str | None = option(None, "model or checkpoint whose prompt and tokens the page shows")
    image_size: int | None = option(None, "image size, if the dataset's does not fit the model")
    rows: str = option("8", "number of rows, evenly spaced, or row numbers 0,100,200 (default: %(default)s)")
    output: Path | None = option(None, "write a page", metavar="PAGE.html")
    png: Path | None = option(None, "write a picture", metavar="SHEET.png")

    def __post_init__(self):
        if self.output is None and self.png is None:
            raise ValueError("say where to: --output PAGE.html, --png SHEET.png, or both")
        if not re.fullmatch(r"[1-9]\d{0,8}|\d{1,9}(,\d{1,9})+", self.rows, re.ASCII):
            raise ValueError(f"--rows {self.rows}: expected a number of rows or row numbers 0,100,200")


def main() -> None:
    args = parse(Arguments, __doc__)
    from vla0_trl.data.chat_dataset import load_chat_dataset  # after parsing: datasets and torch take seconds
    from vla0_trl.data.row_check import check_rows
    from vla0_trl.data.viewer import contact_sheet, html_page

    with user_errors():
        dataset, config = load_chat_dataset(args.dataset)
        chosen = dataset.select(row_indices(args.rows, len(dataset)))
        check_rows(args.dataset, chosen, config)
        rows = list(chosen)
        collator = None
        if args.output is not None and args.model_name_or_path is not None:
            collator = _collator(args.model_name_or_path, config, args.image_size)
    if args.output is not None:
        title = f"{args.dataset}: {len(rows)} of {len(dataset)} rows"
        args.output.write_text(html_page(rows, config, title, collator))
        print(f"page: {args.output}")
    if args.png is not None:
        contact_sheet(rows, config).save(args.png)
        print(f"picture: {args.png}")


def row_indices(text: str, length: int) -> list[int]:
    """Of a dataset with `length` rows; `ValueError` for a row that it has not."""
    rows = [int(word) for word in text.split(",")]
    if len(rows) == 1:
        return np.linspace(0, length - 1, min(rows[0], length)).astype(int).tolist()
    if max(rows) >= length:
        raise ValueError(f"--rows {text}: the dataset has rows 0 to {length - 1}")
    return rows


def _collator(name_or_path: str, dataset_config: VLAConfig, image_size: int | None) -> Any:
    """As in training: with a checkpoint's own config, if it has one."""
    from vla0_trl.models.loading import load_processor
    from vla0_trl.processing.collator import VLADataCollator

    config = dataset_config
    if (Path(name_or_path) / CONFIG_NAME).is_file():
        config = VLAConfig.from_pretrained(name_or_path)
    if image_size is not None:
        config = config.replace(image_size=image_size)
    return VLADataCollator(load_processor(name_or_path, config), config, stored_cameras=dataset_config.cameras)


if __name__ == "__main__":
    main()
