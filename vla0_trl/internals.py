"""What we use of transformers' and TRL's inside, all of it, and how we give way when a release changes it.

Beside their public classes and arguments, our code relies on the following. None of it is promised to stay:

decoding (`policy/speculative/`), compared with stock `generate()` on each model's first chunk; parallel decoding with
one plain forward pass, whose `logits_to_keep` we set
- `generate(custom_generate=f)`: hands prompts, prepared inputs and generation config to `f`; takes more arguments (our
  `drafts`) from the signature of `f`;
- a `Cache` of our own (`SlotCache`): attention layers call `update(keys, values, layer_idx)` and attend to what that
  gives back; `get_seq_length()` of 0 leaves masks and positions to us;
- a 4-D additive mask (B, 1, queries, slots) and position ids are taken as they are;
- `base_model` and `get_decoder()` give `last_hidden_state`, which the output embeddings turn into logits without
  scaling or capping. Names are asked of the model's own signature: the cache's, and which prepared inputs it takes.

training (`models/attention.py`, `training/trainer.py`), compared with the stock forward pass on the first batch
- `AttentionInterface` and `AttentionMaskInterface`: their functions' arguments, `repeat_kv`, `sdpa_attention_forward`,
  `sdpa_mask` and the mask functions that it is called with; `config._attn_implementation`;
- SmolVLM's parts, for the hook that places image features: `vision_model(pixels, patch_attention_mask)`, `connector`,
  `inputs_embeds` in place of `input_ids` and `pixel_values`;
- TRL's fused LM head: `model(…, fused_lm_head=True)` gives `log_probs` and `label_mask`, and is the last call that
  `compute_loss` makes of the model; `trl.trainer.utils._use_triton` says whether it scores labels' positions alone;
  `compute_loss` and `log` count metrics by `model.training`.

not compared: a change stops the program, or a test
- `Trainer._prepare_inputs`, `_get_train_sampler`, `_save_checkpoint` and `_issue_warnings_after_load` are overridden
  (`training/trainer.py`, `training/checkpoints.py`); `all_tied_weights_keys`; `_train_batch_size`, `_metrics`;
  `rotate_checkpoints`, `trainer_state.json`, `unset_hf_deepspeed_config`, `get_model_param_count`;
- benchmarks: `trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE` (`benchmarks/memory.py`) and TRL's own collator.

On disagreement there is one [`FallbackWarning`], and the plain way goes on: slower, and right.
"""

import warnings
from importlib.metadata import version

# Which way ran, in results, benchmarks and logs.
FAST, STOCK, PARALLEL = "fast", "stock", "parallel"


class FallbackWarning(UserWarning):
    """Our own decoding or forward pass did not agree with the library's, which is used from now on."""


def disagreement(what: str, model: object, failure: str, packages: tuple[str, ...]) -> str:
    """One line that names the model, the versions and the difference: "fast decoding of … raised TypeError: …"."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{what} of {type(model).__name__} does not work with {versions}: it {failure}"


def warn_fallback(message: str, instead: str) -> None:
    """Say once that the plain way goes on."""
    warnings.warn(
        f"{message.rstrip('.')}. {instead} is used from now on: slower, and right.", FallbackWarning, stacklevel=2
    )


def raised(error: Exception) -> str:
    """An exception as a failure for [`disagreement`]."""
    first_line, *_ = str(error).splitlines() or [""]
    return f"raised {type(error).__name__}: {first_line}"
