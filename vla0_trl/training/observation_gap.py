"""Does the policy look? Metrics of a training run that tell seeing from continuing numbers.

Token loss and accuracy fall long before a policy sees anything: after "256 25" comes another digit, whatever the image
shows. So every `probe_steps` a fixed sample of rows is scored without masking, and the same rows once more with what
another row saw in place of what they saw; and the policy answers them, as it would on a robot.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from vla0_trl.actions import join_integers, relative_reference
from vla0_trl.policy.policy import VLAPolicy
from vla0_trl.processing.collator import Row, row_observation

PROBE_ROWS = 128
# What is taken from another row; the states are the prompt's text, and the answer stays the row's own.
_EXCHANGED = {"observation_gap": ("images", "state"), "image_gap": ("images",), "state_gap": ("state",)}


class ProbeCallback(TrainerCallback):
    """Every `probe_steps`, logs what the policy has learnt to see. Losses and gaps are in nats per token.

    - `first_action_loss` and `first_value_loss`: the loss on the first action of the chunk, and on its first number
      alone, which nothing in the answer gives away;
    - `observation_gap`: the loss when images and states are another row's, minus the loss with the row's own. While it
      is near zero, the policy ignores what it sees;
    - `image_gap` and `state_gap`: the same with only one of the two exchanged, where the prompt has both;
    - `chunk_rmse`: root mean square error of the chunks that the policy answers, over the steps that are written, in
      environment units; for relative actions also `stay_rmse`, the error of staying. Not of sharded models, which
      cannot answer alone.

    The rows are of the held-out episodes if there are any, else of the training set. Nothing is drawn at random, so
    a run with probes has the same losses as one without. All processes take part, each with its share of the rows.
    """

    def __init__(self, trainer: SFTTrainer):
        self.trainer, self.collator = trainer, trainer.eval_collator
        dataset, processes = trainer.eval_dataset or trainer.train_dataset, trainer.args.world_size
        count = min(PROBE_ROWS, len(dataset)) // (2 * processes) * 2 * processes
        if not count:
            raise ValueError(f"probe_steps needs at least {2 * processes} rows, there are {len(dataset)}")
        # Spread evenly; the partner is half of them away, and so of another episode.
        chosen = torch.linspace(0, len(dataset) - 1, count).long().tolist()
        self._mine = slice(trainer.args.process_index, None, processes)
        self._dataset, self._chosen, self._partners = dataset, chosen, chosen[count // 2 :] + chosen[: count // 2]
        self.gaps = list(_EXCHANGED)[: None if trainer.vla_config.use_state else 1]
        self.answers = not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.probe_steps:
            return
        self.trainer.model.eval()
        try:
            metrics = self.measure()
        finally:
            self.trainer.model.train()
        self.trainer.log_beside_training(control, metrics)

    def measure(self) -> dict[str, float]:
        """The metrics of the model as it is; all processes call it."""
        raw = [self._dataset[index] for index in self._chosen[self._mine]]
        rows = [self._as_text(row) for row in raw]
        others = [self._as_text(self._dataset[index]) for index in self._partners[self._mine]]
        loss, action, value = self._losses(rows)
        metrics = {"first_action_loss": action, "first_value_loss": value}
        for name in self.gaps:
            pairs = zip(rows, others, strict=True)
            mixed = [row | {key: other[key] for key in _EXCHANGED[name]} for row, other in pairs]
            metrics[name] = self._losses(mixed)[0] - loss
        return metrics | (self._chunk_errors(raw) if self.answers else {})

    def _as_text(self, row: Row) -> Row:
        """A row with its state and action as text only: relative actions are counted from the row's own state."""
        state, action = map(join_integers, self.collator.integers(row))
        unchanged = ("images", "task", "episode_index", "frame_index")
        return {name: row[name] for name in unchanged} | {"state": state, "action": action}

    def _chunk_errors(self, rows: Sequence[Row]) -> dict[str, float]:
        """Of rows with their raw columns, over all processes."""
        trainer, config, size = self.trainer, self.trainer.vla_config, self.trainer.args.per_device_eval_batch_size
        policy = VLAPolicy(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, config)
        errors, written = {"chunk_rmse": [], "stay_rmse": []}, config.written_steps
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            observations = [row_observation(row, self.collator.stored_cameras, config) for row in part]
            chunks = policy.predict_action_chunk(observations)
            for row, chunk in zip(part, chunks, strict=True):
                true = np.asarray(row["raw_action"]).reshape(-1, config.action_dim)[written]
                errors["chunk_rmse"].append(((chunk[written] - true) ** 2).mean())
                if config.relative_actions:
                    here = relative_reference(row["raw_state"], config.action_dim)
                    errors["stay_rmse"].append(((here - true) ** 2).mean())
        found = {name: values for name, values in errors.items() if values}
        means = torch.tensor([np.mean(values) for values in found.values()], device=trainer.args.device)
        means = trainer.accelerator.reduce(means.float(), "mean").sqrt().tolist()  # each process has as many rows
        return dict(zip(found, means, strict=True))

    @torch.no_grad()
    def _losses(self, rows: Sequence[Row]) -> tuple[float, float, float]:
        """Mean loss of all answer tokens, of those of the first action, and of the first value, over all processes."""
        size, sums = self.trainer.args.per_device_eval_batch_size, torch.zeros(6, device=self.trainer.args.device)
        dim = self.collator.config.action_dim
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            inputs = self.trainer.prepare_batch(self.collator(part))
            with self.trainer.compute_loss_context_manager():
                outputs = self.trainer.model_wrapped(**inputs, use_cache=False, fused_lm_head=True)
            counted, mask = outputs.label_mask.cumsum(1), outputs.label_mask
            masks = [mask, *(mask & (counted <= self._first_tokens(part, n).to(sums.device)) for n in (dim, 1))]
            for place, chosen in enumerate(masks):
                sums[2 * place] -= (outputs.log_probs * chosen).sum()
                sums[2 * place + 1] += chosen.sum()
        sums = self.trainer.accelerator.reduce(sums, "sum")
        return tuple((sums[::2] / sums[1::2]).tolist())

    def _first_tokens(self, rows: Sequence[Row], count: int) -> torch.Tensor:
        """int64 (B, 1): how many tokens of each answer spell its first `count` numbers."""
        chat = self.collator.chat_tokenizer
        end_of_turn = len(chat.encode_answer([])[0])
        numbers = [self.collator.integers(row)[1][:count] for row in rows]
        return torch.tensor([[len(chat.encode_answer(first)[0]) - end_of_turn] for first in numbers])
