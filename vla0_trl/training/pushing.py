"""A training's uploads to the Hub: each checkpoint during the training, and the policy at the end."""

import json
import shutil
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from vla0_trl.config import NANO
from vla0_trl.hub import HubError, address, open_repository, upload
from vla0_trl.manifest import CHECKPOINT_FILE, claimed, read_json, trained_on
from vla0_trl.run_folder import RUN_FILE, STATE_FILE
from vla0_trl.training.arguments import VLASFTConfig

# Files of a checkpoint that only a training needs, by how their names begin.
FOR_RESUMING = ("optimizer", "scheduler", "scaler", "rng_state", "latest", "zero_to_fp32")
# Useless to a policy's users, and the first one is pickled: users should not have to unpickle a stranger's upload.
_STAYS = ("training_args.bin", "trainer_state.json")


def open_model_repository(training: VLASFTConfig, model_name_or_path: str, use_peft: bool) -> str:
    """The repository of a run with `push_to_hub`, there and ours before the first step; its full id."""
    if use_peft and (model_name_or_path == NANO or Path(model_name_or_path).is_dir()):
        raise ValueError(
            f"push_to_hub of an adapter of {model_name_or_path}, which nobody else has: upload the base model first "
            "and train on its id, or merge the adapter (recipes/merge_adapter.py)"
        )
    name = training.hub_model_id or Path(training.output_dir).resolve().name
    return open_repository(name, "model", training.hub_private_repo, training.hub_token)


def push_policy(
    folder: Path, repo_id: str, message: str, revision: str | None = None, token: str | None = None
) -> str:
    """Upload a checkpoint's policy as the repository's content; returns where it is. Options: see [`upload`]."""
    files: dict[str, Path | bytes] = {}
    for path in claimed(folder):
        if path.parent == folder and not path.name.startswith(FOR_RESUMING) and path.name not in _STAYS:
            files[path.name] = path
    sizes = {name: path.stat().st_size for name, path in files.items() if name != CHECKPOINT_FILE}
    manifest = {"files": sizes, "trained_on": trained_on(folder)}
    files[CHECKPOINT_FILE] = json.dumps(manifest).encode() + b"\n"
    commit = upload(files, repo_id, "model", message, revision, token)
    return f"{address(repo_id, 'model')} at revision {commit}"


def push_finished(training: VLASFTConfig) -> None:
    """Upload the policy in `output_dir`, if the run is to; `HubError` if that was not finished."""
    if training.push_to_hub and training.should_save:
        target = (training.hub_model_id, "End of training", training.hub_revision, training.hub_token)
        print(f"uploaded: {push_policy(Path(training.output_dir), *target)}")


def restore_checkpoint(uploaded: Path, output_dir: Path) -> None:
    """Lay a download of `last-checkpoint/` where its training looks for it; `output_dir` must not exist."""
    partial = output_dir.with_name(f"{output_dir.name}.partial")  # after a kill the copies are made again
    checkpoint = partial / f"{PREFIX_CHECKPOINT_DIR}-{read_json(uploaded / STATE_FILE)['global_step']}"
    shutil.copytree(uploaded, checkpoint, ignore=shutil.ignore_patterns(RUN_FILE), dirs_exist_ok=True)
    shutil.copy(uploaded / RUN_FILE, partial)
    partial.rename(output_dir)


class Uploads:
    """Uploads beside a training, one after another, as `hub_strategy` and `hub_always_push` say."""

    def __init__(self, training: VLASFTConfig):
        self.training = training
        self._api = HfApi()  # one: each has a thread of its own, which works through its uploads in order
        self._under_way: list[tuple[Path, Future]] = []

    def begin(self, checkpoint: Path, step: int) -> None:
        """Upload a checkpoint in the background; without `hub_always_push` only if the last one has arrived."""
        strategy = self.training.hub_strategy
        if strategy == HubStrategy.END or (self.busy() and not self.training.hub_always_push):
            return
        self.finish(wait=False)
        self._under_way.append((checkpoint, self._api.run_as_future(self._push, checkpoint, step)))

    def busy(self) -> list[Path]:
        """The checkpoints that are being read, and so must stay."""
        return [folder for folder, future in self._under_way if not future.done()]

    def finish(self, wait: bool = True) -> None:
        """Say which uploads failed; a training goes on without them, and its last upload has everything."""
        rest = []
        for folder, future in self._under_way:
            if not wait and not future.done():
                rest.append((folder, future))
                continue
            try:
                future.result()
            except (HubError, FileNotFoundError) as error:
                print(f"warning: {folder.name} was not uploaded: {error}", flush=True)
        self._under_way = rest

    def _push(self, checkpoint: Path, step: int) -> None:
        training = self.training
        target = {"revision": training.hub_revision, "token": training.hub_token}
        push_policy(checkpoint, training.hub_model_id, f"Step {step}", **target)
        if training.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = training.hub_strategy == HubStrategy.CHECKPOINT
            folder = "last-checkpoint" if last else checkpoint.name
            files = {f"{folder}/{path.relative_to(checkpoint)}": path for path in claimed(checkpoint)}
            files[f"{folder}/{RUN_FILE}"] = checkpoint.parent / RUN_FILE
            message = f"Step {step}, with what a training needs to go on"
            upload(files, training.hub_model_id, "model", message, **target)
