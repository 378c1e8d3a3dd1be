"""Whole checkpoints: one that a kill left half written is never used as a policy, and never resumed from."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from vla0_trl.config import CONFIG_NAME, VLAConfig
from vla0_trl.manifest import (
    CHECKPOINT_FILE,
    claimed,
    damage,
    delete_claimed,
    files_of,
    read_json,
    trained_on,
    write_manifest,
)
from vla0_trl.models.fingerprint import is_adapter, save_base_fingerprint
from vla0_trl.policy.card import write_model_card
from vla0_trl.run_files import read_state
from vla0_trl.run_folder import RUN_FILE, STATE_FILE, FolderError, checkpoints, last_checkpoint
from vla0_trl.schema import one_line
from vla0_trl.training.arguments import VLASFTConfig
from vla0_trl.training.pushing import FOR_RESUMING, Uploads


class CheckpointingTrainer(SFTTrainer):
    """`SFTTrainer` that saves `vla_config` and a card with every checkpoint, and a list of its files, as the last one.

    With `push_to_hub`, checkpoints are uploaded as they are whole, instead of what Trainer finds in `output_dir`.
    """

    vla_config: VLAConfig
    trained_on: dict[str, Any]
    uploads: Uploads
    _limit: int | None

    def save_policy(self, directory: Path, with_state: bool = False) -> None:
        """Save a self-sufficient checkpoint, with the state of a finished run beside it; all processes call it."""
        with self._marked_whole(directory):
            self.save_model(str(directory), _internal_call=True)  # else Trainer would upload output_dir
            if with_state:
                self.save_state()  # into output_dir

    def train(self, *args, **kwargs):
        """As `Trainer.train`, but `_save_checkpoint` alone deletes old checkpoints."""
        # They may only go once the new one is whole, or a kill in between would leave none. And at the end, or after a
        # stop, Trainer would delete the last one, from which a run goes on, if another is the best.
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.save_total_limit = self._limit

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with self._marked_whole(checkpoint):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub and self.is_world_process_zero():
            self.uploads.begin(checkpoint, self.state.global_step)
        if self.args.should_save and self._limit:
            best = Path(self.state.best_model_checkpoint or "").name
            whole = [path for path in checkpoints(Path(self.args.output_dir)) if damage(path) is None]
            for path in [path for path in whole if path.name != checkpoint.name][self._limit - 1 :]:
                if path.name != best and path not in self.uploads.busy():
                    delete_claimed(path)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Tied embeddings are saved once, and loaded twice; a user would take Trainer's warning for lost weights.
        missing = [key for key in load_result.missing_keys if key not in self.model.all_tied_weights_keys]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing: `prepare` opened the repository before the model was loaded."""
        self.hub_model_id = self.args.hub_model_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: Trainer calls it before a checkpoint is whole, and `_save_checkpoint` uploads it then."""

    def _finish_current_push(self) -> None:
        self.uploads.finish()

    def create_model_card(self, *_, **__) -> None:
        """Nothing: every checkpoint gets its card with its other files."""

    @contextmanager
    def _marked_whole(self, directory: Path) -> Iterator[None]:
        """The manifest is gone while a checkpoint is written, and back once all processes have written theirs."""
        output_dir, not_ours = Path(self.args.output_dir), set()
        # Meanwhile evaluations may be at work in folders of output_dir, with a lock beside: `.eval.lock`.
        pattern = "[!.]*" if directory == output_dir else "**/*"
        if self.args.should_save:
            delete_claimed(directory, unfinished=True)  # half written when an earlier session was killed, perhaps
            not_ours = set(files_of(directory, pattern))
        self.accelerator.wait_for_everyone()
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:  # torch raises the last
            raise OSError(
                f"{directory} could not be written, the disk is full perhaps ({one_line(error, 200)}): make room and "
                "run the same command again: it goes on from the last whole checkpoint"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if is_adapter(directory):
                save_base_fingerprint(directory)
            self.vla_config.save_pretrained(directory)
            name = self.args.hub_model_id or output_dir.resolve().name
            run = read_json(output_dir / RUN_FILE) or {}
            write_model_card(directory, name, run, self.trained_on, self.state.global_step)
            files = files_of(directory, pattern)
            files = {name: size for name, size in files.items() if name not in not_ours}
            write_manifest(directory, files, self.trained_on)


def resume_point(output_dir: Path, asked: str | None, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: the newest that is whole and has an optimizer's state; None: from the beginning.

    `asked` is `resume_from_checkpoint`; `say` prints what is passed over, and why. `FolderError` if only checkpoints
    without an optimizer's state are left, so that losses would be other ones.
    """
    problem = None
    for checkpoint in [Path(asked)] if asked else checkpoints(output_dir):
        problem = damage(checkpoint)
        if problem is None and any("optim" in str(path.relative_to(checkpoint)) for path in claimed(checkpoint)):
            return checkpoint
        lacks_optimizer = problem is None
        problem = problem or "it has no optimizer's state (save_only_model?)"
        if asked or lacks_optimizer:
            raise FolderError(
                f"{checkpoint} can't be resumed from: {problem}. Start again with --overwrite, or begin another run "
                f"from its weights: --model_name_or_path {checkpoint}"
            )
        say(f"warning: {checkpoint} is passed over: {problem}")
    return None


def finish_from_checkpoint(training: VLASFTConfig) -> bool:
    """Make the final policy of a run that was killed after its last step, while it saved; whether it was so."""
    output_dir = Path(training.output_dir)
    last = last_checkpoint(output_dir)
    state = read_state(last) if last else None
    if state is None or not _is_trained(state, training):
        return False
    best = state["best_model_checkpoint"] if training.load_best_model_at_end else None
    policy = output_dir / Path(best or last).name
    if damage(policy) is not None:
        return False
    if training.should_save:
        delete_claimed(output_dir, unfinished=True)
        files = [path for path in claimed(policy) if path.parent == policy and not path.name.startswith(FOR_RESUMING)]
        files = [path for path in files if path.name not in (CHECKPOINT_FILE, STATE_FILE)] + [last / STATE_FILE]
        copies = [shutil.copy2(path, output_dir) for path in files]
        sizes = {Path(copy).name: Path(copy).stat().st_size for copy in copies}
        write_manifest(output_dir, sizes, trained_on(last))
    return True


def is_finished(training: VLASFTConfig) -> bool:
    """Whether `output_dir` holds the final policy of a run at least as long as this one."""
    folder = Path(training.output_dir)
    state = read_state(folder)
    whole = (folder / CONFIG_NAME).is_file() and damage(folder) is None
    return state is not None and whole and _is_trained(state, training)


def _is_trained(state: dict[str, Any], training: VLASFTConfig) -> bool:
    """Whether a run with this state has taken the last step that this run would take."""
    threshold = training.stop_at_token_accuracy
    names = {"loss", "mean_token_accuracy"}
    logged = [entry["mean_token_accuracy"] for entry in state["log_history"] if entry.keys() >= names]
    if threshold is not None and logged and logged[-1] >= threshold:
        return True
    if training.max_steps > 0:
        return state["global_step"] >= training.max_steps
    return round(state["epoch"], 6) >= training.num_train_epochs  # the state's own num_train_epochs is rounded up
