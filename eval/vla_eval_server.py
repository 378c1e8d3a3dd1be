"""A checkpoint for vla-eval's benchmarks: LIBERO, LIBERO-Plus, LIBERO-PRO, SimplerEnv, CALVIN, RoboCasa and others.

    pip install -c requirements.lock -e . && pip install vla-eval==0.8.0
    python eval/vla_eval_server.py --address 127.0.0.1:8000 --args.model_name_or_path RUN
    vla-eval run --config configs/libero_spatial.yaml          # theirs; it asks ws://localhost:8000

Give --address: without, vla-eval listens on all of this machine's addresses, and it knows no key. Chunks are executed
as the checkpoint says, or as --args.n_action_steps or --args.ensemble_size do.
"""

import sys
from typing import Any

import numpy as np

try:
    from vla_eval.model_servers.base import SessionContext
    from vla_eval.model_servers.predict import PredictModelServer
    from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW, DimSpec
except ImportError as error:
    sys.exit(f"{__doc__}\nerror: {error}: this needs vla-eval as well: pip install vla-eval==0.8.0")

from vla0_trl.execution_arguments import ExecutionArguments
from vla0_trl.policy.execution import ChunkExecutor
from vla0_trl.policy.policy import VLAPolicy, resolve_device
from vla0_trl.serving.vla_eval import observation_params, read_observation


class VLA0Server(PredictModelServer):
    """A checkpoint behind vla-eval's protocol.

    Args:
        model_name_or_path: checkpoint, full or adapter: a folder or a Hub id.
        n_action_steps: steps of a chunk to execute before the next (default: its own).
        ensemble_size: ask at every step and average this many chunks (default: its own).
        device: cuda, cpu, … (default: a GPU if there is one).
        dtype: bfloat16 or float32 (default: bfloat16 on a GPU, float32 on a CPU).
        max_batch_size: sessions in one call of the model, at most.
    """

    def __init__(
        self,
        model_name_or_path: str,
        n_action_steps: int | None = None,
        ensemble_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int = 8,
    ):
        self.policy = VLAPolicy.from_pretrained(model_name_or_path, *resolve_device(device, dtype))
        asked = ExecutionArguments(n_action_steps=n_action_steps, ensemble_size=ensemble_size)
        self.policy.config = asked.execution_of(self.policy.config)
        # An ensemble's single actions pass vla-eval's buffer of chunks by; it executes the others.
        self.averages = self.policy.config.ensemble_size > 1
        super().__init__(
            chunk_size=None if self.averages else self.policy.config.n_action_steps, max_batch_size=max_batch_size
        )
        self._executors: dict[str, ChunkExecutor] = {}

    def get_observation_params(self) -> dict[str, Any]:
        return observation_params(self.policy.config)

    def get_action_spec(self) -> dict[str, DimSpec]:
        return {"actions": RAW}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        state = {"state": RAW} if "send_state" in self.get_observation_params() else {}
        return {"image": IMAGE_RGB} | state | {"language": LANGUAGE}

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        await super().on_episode_start(config, ctx)
        self._executors[ctx.session_id] = ChunkExecutor(self.policy.config)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        await super().on_episode_end(result, ctx)
        self._executors.pop(ctx.session_id, None)

    def predict_batch(self, obs_batch: list[dict], ctx_batch: list[SessionContext]) -> list[dict[str, np.ndarray]]:
        """Chunks (chunk_size, action_dim), or the one action (action_dim,) that an ensemble executes now."""
        config = self.policy.config
        observations = [
            read_observation(found, config) | {"episode": (ctx.session_id, ctx.episode_id)}
            for found, ctx in zip(obs_batch, ctx_batch, strict=True)
        ]
        chunks = self.policy.predict_action_chunk(observations)
        if not self.averages:
            return [{"actions": config.postprocess_actions(chunk)} for chunk in chunks]
        executors = [self._executors[ctx.session_id] for ctx in ctx_batch]
        return [{"actions": executor.actions(chunk)[0]} for executor, chunk in zip(executors, chunks, strict=True)]


if __name__ == "__main__":
    from vla_eval.model_servers.serve import run_server

    run_server(VLA0Server)
