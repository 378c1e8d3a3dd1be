"""Does the policy look? Two metrics of a training run that tell seeing from continuing numbers.

Token loss and accuracy fall long before a policy sees anything: after "256 25" comes another digit, whatever the image
shows. So every `probe_steps` a fixed sample of rows is scored without masking, and the same rows once more with what
another row saw in place of what they saw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from vla0_trl.actions import join_integers
from vla0_trl.processing.collator import Row

PROBE_ROWS = 128
# What is taken from another row; the states are the prompt's text, and the answer stays the row's own.
_EXCHANGED = {"observation_gap": ("images", "state"), "image_gap": ("images",), "state_gap": ("state",)}


class ProbeCallback(TrainerCallback):
    """Every `probe_steps`, logs what the policy has learnt to see, in nats a token.

    - `first_action_loss`: the loss on the first action of the chunk alone, which nothing in the answer gives away;
    - `observation_gap`: the loss when images and states are another row's, minus the loss with the row's own. While it
      is near zero, the policy ignores what it sees;
    - `image_gap` and `state_gap`: the same with only one of the two exchanged, where the prompt has both.

    The rows are of the held-out episodes if there are any, else of the training set. Nothing is drawn at random, so
    a run with probes has the same losses as one without. All processes take part, each with its share of the rows.

    Args:
        trainer ([`VLATrainer`]): whose model is scored, and which logs.
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
        rows = [self._as_text(self._dataset[index]) for index in self._chosen[self._mine]]
        others = [self._as_text(self._dataset[index]) for index in self._partners[self._mine]]
        loss, first = self._losses(rows)
        metrics = {"first_action_loss": first}
        for name in self.gaps:
            mixed = [
                row | {key: other[key] for key in _EXCHANGED[name]} for row, other in zip(rows, others, strict=True)
            ]
            metrics[name] = self._losses(mixed)[0] - loss
        return metrics

    def _as_text(self, row: Row) -> Row:
        """A row with its state and action as text only: relative actions are counted from the row's own state."""
        state, action = map(join_integers, self.collator.integers(row))
        kept = ("images", "task", "episode_index", "frame_index")
        return {name: row[name] for name in kept} | {"state": state, "action": action}

    @torch.no_grad()
    def _losses(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Mean loss of all answer tokens, and of those of the first action, over all processes."""
        size, sums = self.trainer.args.per_device_eval_batch_size, torch.zeros(4, device=self.trainer.args.device)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            inputs = self.trainer.prepare_batch(self.collator(part))
            with self.trainer.compute_loss_context_manager():
                outputs = self.trainer.model_wrapped(**inputs, use_cache=False, fused_lm_head=True)
            of_first = outputs.label_mask.cumsum(1) <= self._first_action_tokens(part).to(sums.device)
            for place, mask in ((0, outputs.label_mask), (2, outputs.label_mask & of_first)):
                sums[place] -= (outputs.log_probs * mask).sum()
                sums[place + 1] += mask.sum()
        loss, tokens, first_loss, first_tokens = self.trainer.accelerator.reduce(sums, "sum").tolist()
        return loss / tokens, first_loss / first_tokens

    def _first_action_tokens(self, rows: Sequence[Row]) -> torch.Tensor:
        """int64 (B, 1): how many tokens of each answer spell its first action."""
        chat, dim = self.collator.chat, self.collator.config.action_dim
        end_of_turn = len(chat.encode_answer([])[0])
        actions = [self.collator.integers(row)[1][:dim] for row in rows]
        return torch.tensor([[len(chat.encode_answer(action)[0]) - end_of_turn] for action in actions])
