"""VLAPolicy: observations in, action chunks out. Evaluation, serving and training-time rollouts all use it."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, ProcessorMixin

from vla0_trl.actions import parse_integers
from vla0_trl.config import VLAConfig
from vla0_trl.ensembling import TemporalEnsembler
from vla0_trl.grammar import ActionGrammar, ActionGrammarLogitsProcessor
from vla0_trl.images import crop, model_inputs, stack_cameras
from vla0_trl.modeling import checkpoint_folder, load_model, load_processor
from vla0_trl.tokenization import ChatTokenizer

if TYPE_CHECKING:
    from peft import PeftModel

Observation = dict[str, Any]


class VLAPolicy:
    """A checkpoint that acts.

    An observation is `{"images": {camera: uint8[H, W, 3]}, "state": float32[state_dim] | None, "task": str}`.

    Args:
        model: a backbone, full or with adapter; its own generation_config is replaced: evaluation is greedy.
        processor: made by [`modeling.load_processor`].
        config ([`VLAConfig`]): with statistics.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, processor: ProcessorMixin, config: VLAConfig):
        self.model, self.processor = model, processor
        self.config = config
        self.chat = ChatTokenizer(processor, config)
        self.grammar = ActionGrammar(self.chat, config.num_values, config.num_bins)
        self.actions = config.action_tokenizer()
        self.states = config.state_quantizer()
        # What a checkpoint says of sampling, penalties or lengths must not leak into evaluation, and generate() fills
        # unset fields from the model's own generation_config.
        self.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.grammar.max_new_tokens,
            eos_token_id=self.chat.end_of_turn_id,
            pad_token_id=self.chat.pad_id,
        )
        backbone = model if isinstance(model, PreTrainedModel) else model.get_base_model()
        backbone.generation_config = self.generation_config

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
    ) -> VLAPolicy:
        """Load a checkpoint, full or adapter, from a folder or the Hub; it needs nothing else.

        Args:
            device, dtype: see [`resolve_device`].
        """
        folder = checkpoint_folder(name_or_path, revision)
        device, dtype = resolve_device(device, dtype)
        config = VLAConfig.from_pretrained(folder)
        return cls(load_model(folder, dtype=dtype).to(device).eval(), load_processor(folder, config), config)

    @property
    def config(self) -> VLAConfig:
        """How the checkpoint speaks, and how its chunks are executed; another execution may be set at any time."""
        return self._config

    @config.setter
    def config(self, config: VLAConfig) -> None:
        self._config = config
        self.reset()

    @torch.no_grad()
    def predict_action_chunk(self, observations: list[Observation]) -> np.ndarray:
        """B observations -> float32 (B, chunk_size, action_dim) in environment units.

        Raises:
            ValueError: an observation lacks a camera or state, or does not fit the config.
        """
        inputs = self._inputs(observations)
        output = self.model.generate(
            **inputs,
            generation_config=self.generation_config,
            logits_processor=LogitsProcessorList([ActionGrammarLogitsProcessor(grammar=self.grammar)]),
        )
        answers = output[:, inputs["input_ids"].shape[1] :].cpu()
        return np.stack([self._decode(a, o) for a, o in zip(answers, observations, strict=True)])

    def select_action(self, observation: Observation) -> np.ndarray:
        """One observation -> the next action, float32 (action_dim,), ready to execute.

        Replays `n_action_steps` of a chunk before it asks the model again; with `ensemble_size` > 1 it asks at every
        step and averages. Call `reset()` between episodes.
        """
        if self.config.ensemble_size > 1:
            action = self._ensembler.update(self.predict_action_chunk([observation])[0])
        else:
            if not self._queue:
                self._queue.extend(self.predict_action_chunk([observation])[0][: self.config.n_action_steps])
            action = self._queue.popleft()
        return self.config.executable(action)

    def reset(self) -> None:
        """Forget the current chunk: a new episode begins."""
        self._queue: deque[np.ndarray] = deque()
        self._ensembler = TemporalEnsembler(self.config.chunk_size, self.config.ensemble_size)

    def _inputs(self, observations: list[Observation]) -> dict[str, torch.Tensor]:
        """The batch for `generate`: prompts padded on the left, images on the model's device."""
        prompts, images = [], []
        for observation in observations:
            missing = set(self.config.cameras) - observation["images"].keys()
            if missing:
                raise ValueError(
                    f"the observation lacks cameras {sorted(missing)}: it has {list(observation['images'])}"
                )
            images.append([crop(observation["images"][name], self.config.crop_ratio) for name in self.config.cameras])
            state = ()
            if self.states is not None:
                if observation["state"] is None:
                    raise ValueError("this policy reads the state, but the observation has none")
                state = self.states.encode(observation["state"])
            prompts.append(self.chat.encode_prompt(observation["task"], state))
        length = max(map(len, prompts))
        padded = [[self.chat.pad_id] * (length - len(ids)) + ids for ids in prompts]
        kept = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self.model.device
        batch = {"input_ids": torch.tensor(padded, device=device), "attention_mask": torch.tensor(kept, device=device)}
        cameras = [camera.to(device) for camera in stack_cameras(images, self.config.cameras)]
        pixels = model_inputs(self.processor.image_processor, cameras, self.config)
        return batch | self.chat.token_types(batch["input_ids"]) | pixels

    def _decode(self, answer: torch.Tensor, observation: Observation) -> np.ndarray:
        text = self.processor.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        integers = parse_integers(text, self.config.num_values, self.config.num_bins)
        return self.actions.from_integers(integers, observation["state"])


def resolve_device(
    device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> tuple[torch.device, torch.dtype]:
    """Where to run, by default on a GPU if there is one, and in what: bfloat16 there, float32 on a CPU."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
