"""VLAPolicy: observations in, action chunks out. Evaluation, serving and training-time rollouts all use it."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel, ProcessorMixin

from vla0_trl.actions import relative_reference
from vla0_trl.config import VLAConfig
from vla0_trl.internals import PARALLEL
from vla0_trl.models.loading import checkpoint_folder, load_model, load_processor
from vla0_trl.policy.execution import ChunkExecutor
from vla0_trl.policy.grammar import ActionGrammar
from vla0_trl.policy.observation import Observation, check_observation, check_prefixes
from vla0_trl.policy.sessions import Sessions
from vla0_trl.policy.speculative.decoder import ChunkDecoder
from vla0_trl.policy.speculative.options import DecodingOptions
from vla0_trl.policy.speculative.parallel import ParallelReader
from vla0_trl.policy.speculative.self_check import decode, way_of_decoding
from vla0_trl.processing.chat_tokenizer import ChatTokenizer
from vla0_trl.processing.images import crop, model_inputs, stack_cameras

if TYPE_CHECKING:
    from peft import PeftModel

# What the prompt, the pictures and the answers are made of. A policy is built for one such set.
_FIXED = (
    *("cameras", "tile_images", "image_size", "use_system_prompt", "use_state", "state_dim"),
    *("action_dim", "chunk_size", "waypoints", "num_bins", "relative_actions"),
)


class VLAPolicy:
    """A checkpoint that acts.

    An observation is `{"images": {camera: uint8[H, W, 3]}, "state": float32[state_dim] | None, "task": str}`; other
    forms of pictures are converted or refused by [`observation.camera_image`].

    It may carry an `"episode"`, any key; without one, its place in the batch is the key. The last chunk predicted
    under a key is a draft of the next one: if they are similar, decoding is faster; the result never changes.

    Args:
        model: a backbone, full or with adapter; its own generation_config is replaced.
        processor: made by [`models.loading.load_processor`].
        config ([`VLAConfig`]): with statistics.
        decoding ([`DecodingOptions`], *optional*): exact or parallel, by which methods, and how to check it.

    Attributes:
        decoder ([`ChunkDecoder`] or `None`): set to None to decode with stock `generate()` and a logits processor.
            A model's first chunk is decoded both ways, and stock goes on, with a warning, if they differ.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: ProcessorMixin,
        config: VLAConfig,
        decoding: DecodingOptions | None = None,
    ):
        self.model, self.processor = model, processor
        self.chat_tokenizer = ChatTokenizer(processor, config)
        self.grammar = ActionGrammar(self.chat_tokenizer, config.num_values, config.num_bins)
        self._config = config
        # The tokens that all prompts share before the first image, for any task and state.
        tasks = (("a", 0), ("b", 1))
        prompts = [self.chat_tokenizer.encode_prompt(task, [n] * config.state_dim) for task, n in tasks]
        before_image = (prompt[: prompt.index(self.chat_tokenizer.image_token_id)] for prompt in prompts)
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(*before_image, strict=False))
        prefix = [token for token, _ in shared]
        decoding = decoding or DecodingOptions()
        try:
            reader = ParallelReader(self.chat_tokenizer, self.grammar)
        except ValueError:
            if decoding.mode == PARALLEL:
                raise
            reader = None  # exact decoding does without: no drafts of its own
        self.decoder: ChunkDecoder | None = ChunkDecoder(self.grammar, decoding, prefix, config.action_dim, reader)
        # A checkpoint's own sampling, penalties or lengths must not affect evaluation, and generate() fills
        # unset fields from the model's own generation_config.
        self.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.grammar.max_new_tokens,
            eos_token_id=self.chat_tokenizer.end_of_turn_id,
            pad_token_id=self.chat_tokenizer.pad_id,
        )
        backbone = model if isinstance(model, PreTrainedModel) else model.get_base_model()
        backbone.generation_config = self.generation_config
        self._adopt(config)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        load_in_4bit: bool = False,
        decoding: DecodingOptions | None = None,
    ) -> VLAPolicy:
        """Load a checkpoint, full or adapter, from a folder or the Hub; it needs nothing else.

        Args:
            device, dtype: see [`resolve_device`].
            load_in_4bit: keep the linear layers' weights as NF4 (QLoRA, Dettmers et al. 2023), with bitsandbytes:
                a quarter of bfloat16's memory and, where reading weights is what takes the time, faster. Another
                model, strictly: evaluate it as such.
            decoding ([`DecodingOptions`], *optional*): exact by default.
        """
        folder = checkpoint_folder(name_or_path, revision)
        device, dtype = resolve_device(device, dtype)
        config = VLAConfig.from_pretrained(folder)
        quantization = None
        if load_in_4bit:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        model = load_model(folder, dtype=dtype, quantization_config=quantization).to(device)
        return cls(model.eval().requires_grad_(False), load_processor(folder, config), config, decoding)

    @property
    def config(self) -> VLAConfig:
        """How the checkpoint speaks, and how its chunks are executed.

        Another execution (`n_action_steps`, `ensemble_size`, …) or scale (statistics, `normalization`) may be set at
        any time, which begins a new episode. What the model was trained to read and write can't be changed.
        """
        return self._config

    @config.setter
    def config(self, config: VLAConfig) -> None:
        for name in _FIXED:
            ours, asked = getattr(self._config, name), getattr(config, name)
            if ours != asked:
                raise ValueError(
                    f"{name}={asked}, but this policy was made for {name}={ours}: chunk, bins, relative actions, "
                    "prompt and cameras are a checkpoint's own; execution and the scale of actions can be set"
                )
        self._check_draws(config)
        self._adopt(config)

    def _check_draws(self, config: VLAConfig) -> None:
        if config.temperature and self.decoder is not None and self.decoder.options.mode == PARALLEL:
            raise ValueError(
                f"temperature={config.temperature} with parallel decoding: numbers that are drawn without seeing each "
                "other don't fit together. Use exact decoding, or temperature=0"
            )

    def _adopt(self, config: VLAConfig) -> None:
        self._config = config
        self.action_tokenizer = config.action_tokenizer()
        self.state_quantizer = config.state_quantizer()
        self._executor = ChunkExecutor(config)
        self.reset()

    @property
    def decoding(self) -> str:
        """Which way decodes: `"fast"`, or `"stock"` without a decoder, or since it failed its check."""
        return way_of_decoding(self.model, self.decoder)

    @torch.no_grad()
    def predict_action_chunk(
        self, observations: list[Observation], prefixes: Sequence[np.ndarray | None] | None = None
    ) -> np.ndarray:
        """B observations -> float32 (B, chunk_size, action_dim) in environment units.

        Args:
            prefixes: per observation, the actions (d, action_dim) in environment units, d < chunk_size, that the robot
                will execute from this observation on while it waits for the chunk; None or d = 0: none. The answer
                begins with them, counted from this observation's state where actions are relative, and the model
                writes what follows: no jump where old and new actions meet, and fewer passes. They come back
                as they were given. Of waypoints, those before step d are set; those from step d on are the model's.

        Raises:
            ValueError: an observation lacks a camera or state, does not fit the config, or could mean two things; or a
                prefix is not (d, action_dim) finite numbers.
        """
        self._check_draws(self.config)  # a checkpoint's own temperature may still have been replaced
        observations = [check_observation(observation, self.config) for observation in observations]
        prefixes = check_prefixes(prefixes, len(observations), self.config)
        inputs = self._inputs(observations)
        keys = [observation.get("episode", place) for place, observation in enumerate(observations)]
        drafts = [self._draft(key, o, p) for key, o, p in zip(keys, observations, prefixes, strict=True)]
        beginnings = [self._beginning(p, o) for p, o in zip(prefixes, observations, strict=True)]
        if not any(beginnings):
            beginnings = None
        noise = None
        if temperature := self.config.temperature:
            shape = (self.grammar.max_new_tokens, len(self.grammar.token_ids))
            names = [str(observation.get("noise", observation.get("episode", ""))) for observation in observations]
            noise = temperature * self._sessions.noise(keys, names, shape)
        answers = decode(
            self.model, inputs, self.generation_config, self.grammar, self.decoder, drafts, beginnings, noise
        ).cpu()
        spelled = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        texts = self.processor.tokenizer.batch_decode(answers, **spelled)
        chunks = [self.decode_answer(text, o["state"]) for text, o in zip(texts, observations, strict=True)]
        chunks = np.stack(chunks)
        for chunk, prefix in zip(chunks, prefixes, strict=True):
            chunk[: len(prefix)] = prefix
        self._sessions.remember(keys, chunks)
        return chunks

    def select_action(self, observation: Observation) -> np.ndarray:
        """One observation -> the next action, float32 (action_dim,), ready to execute.

        Replays `n_action_steps` of a chunk before it asks the model again; with `ensemble_size` > 1 it asks at every
        step and averages. Call `reset()` between episodes.
        """
        if not self._queue:
            self._queue.extend(self._executor.actions(self.predict_action_chunk([observation])[0]))
        return self._queue.popleft()

    def decode_answer(self, text: str, state: np.ndarray | None = None) -> np.ndarray:
        """An answer's text, from whatever decoded it, -> float32 (chunk_size, action_dim) in environment units.

        Relative actions need the `state` (≥ action_dim,) of the observation that was asked about. `ActionParseError`
        if the text is not an answer; [`ActionGrammar`] exports what is one.
        """
        return self.action_tokenizer.decode(text, state)

    def reset(self) -> None:
        """Forget the current chunk and all drafts: a new episode begins."""
        self._queue: deque[np.ndarray] = deque()
        self._executor.reset()
        self._sessions = Sessions()

    def _beginning(self, prefix: np.ndarray, observation: Observation) -> list[int]:
        """The tokens of the steps that are written before the prefix ends."""
        written = sum(step < len(prefix) for step in self.config.written_steps)
        if not written:
            return []
        padded = np.concatenate([prefix, np.repeat(prefix[-1:], self.config.chunk_size - len(prefix), axis=0)])
        integers = self.action_tokenizer.to_integers(padded, observation["state"])
        return self.chat_tokenizer.encode_beginning(integers[: written * self.config.action_dim])

    def _draft(self, key: Hashable, observation: Observation, prefix: np.ndarray) -> list[int] | None:
        """A guess of the answer: the last chunk from where its execution ended, then its last action on and on.

        With a prefix, the last chunk from where the prefix is found in it. At the beginning a robot that counts from
        its own state is expected to stay; about others nothing is known.
        """
        last = self._sessions.last_chunk(key)
        if last is not None:
            found = np.flatnonzero((last == prefix[0]).all(1)) if len(prefix) else []
            rest = last[found[0] if len(found) else self.config.n_action_steps :]
            guess = np.concatenate([rest, np.repeat(last[-1:], self.config.chunk_size - len(rest), axis=0)])
        elif self.config.relative_actions:
            here = relative_reference(observation["state"], self.config.action_dim)
            guess = np.tile(here, (self.config.chunk_size, 1))
        else:
            return None
        return self.chat_tokenizer.encode_answer(self.action_tokenizer.to_integers(guess, observation["state"]))[0]

    def _inputs(self, observations: list[Observation]) -> dict[str, torch.Tensor]:
        """The batch for `generate`: prompts padded on the left, images on the model's device."""
        prompts, images = [], []
        for observation in observations:
            images.append([crop(observation["images"][name], self.config.crop_ratio) for name in self.config.cameras])
            state = () if self.state_quantizer is None else self.state_quantizer.encode(observation["state"])
            prompts.append(self.chat_tokenizer.encode_prompt(observation["task"], state))
        length = max(map(len, prompts))
        padded = [[self.chat_tokenizer.pad_id] * (length - len(ids)) + ids for ids in prompts]
        attended = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self.model.device
        batch = {
            "input_ids": torch.tensor(padded, device=device),
            "attention_mask": torch.tensor(attended, device=device),
        }
        cameras = [camera.to(device) for camera in stack_cameras(images, self.config.cameras)]
        pixels = model_inputs(self.processor.image_processor, cameras, self.config)
        return batch | self.chat_tokenizer.token_types(batch["input_ids"]) | pixels


def resolve_device(
    device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> tuple[torch.device, torch.dtype]:
    """Where to run, by default on a GPU if there is one, and in what: bfloat16 there, float32 on a CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"--device {device!r} is not a device: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {str(device)!r} was never tried: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
