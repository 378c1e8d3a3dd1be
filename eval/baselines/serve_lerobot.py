# /// script
# requires-python = ">=3.12"
# dependencies = ["lerobot[diffusion,smolvla,pi]==0.6.1", "websockets>=15", "msgpack>=1.1"]
# ///
"""Serve a policy of LeRobot (ACT, diffusion, SmolVLA, π0, …) to our evaluators, by openpi's protocol.

    uv run eval/baselines/serve_lerobot.py --policy_path lerobot/diffusion_pusht --port 8001
    python eval/eval_pusht.py --policy ws://127.0.0.1:8001 --output_dir runs/baselines/diffusion

It runs in an environment of its own, which `uv` makes from the lines above, since LeRobot's versions exclude ours. It
listens on this machine alone.

A chunk is what `select_action` gives in `n_action_steps` steps after `reset`: as in LeRobot, but that a policy which
reads several observations (diffusion: 2) sees the newest one in place of older ones, as in an episode's first step.
"""

import argparse
import hashlib
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np

try:
    import torch
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.server import ServerConnection, serve
except ImportError as error:
    sys.exit(f"{__doc__}\nerror: {error}: start it with `uv run`, which installs LeRobot beside it")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # vla0_trl can't be installed beside LeRobot
from vla0_trl.schema import one_line
from vla0_trl.serving.codec import pack, unpack

STATE, ACTION = "observation.state", "action"


class Policy:
    """A checkpoint of LeRobot with its processors.

    Attributes:
        cameras (`dict[str, str]`): camera -> its feature in LeRobot.
        metadata (`dict`): what clients are told.
    """

    def __init__(self, path: str, device: str, n_action_steps: int | None):
        config = PreTrainedConfig.from_pretrained(path)
        config.device = device
        if n_action_steps is not None:
            config.n_action_steps = n_action_steps
        self.policy = get_policy_class(config.type).from_pretrained(path, config=config).to(device).eval()
        overrides = {"device_processor": {"device": device}}
        self.before, self.after = make_pre_post_processors(config, path, preprocessor_overrides=overrides)
        self.cameras = {feature.rsplit(".", 1)[-1]: feature for feature in config.image_features}
        self.n_action_steps, self.device = config.n_action_steps, device
        self.state_dim = config.robot_state_feature.shape[0] if config.robot_state_feature else 0
        weights = hashlib.sha256()
        for name, weight in sorted(self.policy.state_dict().items()):
            weights.update(name.encode() + weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.metadata = {
            "server": f"LeRobot's {config.type}",
            "protocol": 1,
            "revision": weights.hexdigest(),
            "robot": None,
            "fps": None,  # a checkpoint of LeRobot does not know it
            "chunk_size": self.n_action_steps,
            "n_action_steps": self.n_action_steps,
            "ensemble_size": 1,
            "action_dim": config.output_features[ACTION].shape[0],
            "state_dim": self.state_dim,
            "cameras": {camera: f"observation/{camera}" for camera in self.cameras},
            "state": ["observation/state"] if self.state_dim else [],
            "task": "prompt",
            "units": None,
            "options": [],
            "latency_ms": {},
        }

    @torch.inference_mode()
    def chunk(self, message: dict) -> np.ndarray:
        """float32 (n_action_steps, action_dim)."""
        batch = {"task": [message["prompt"]]}
        for camera, feature in self.cameras.items():
            image = torch.from_numpy(np.array(message[f"observation/{camera}"]))
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8:
                raise ValueError(f"observation/{camera} must be uint8 (H, W, 3), got {tuple(image.shape)}")
            batch[feature] = image.permute(2, 0, 1)[None].float() / 255
        if self.state_dim:
            state = torch.from_numpy(np.array(message["observation/state"], np.float32))
            if state.shape != (self.state_dim,):
                raise ValueError(f"observation/state must have {self.state_dim} numbers, got {tuple(state.shape)}")
            batch[STATE] = state[None]
        batch = self.before(batch)
        self.policy.reset()
        actions = [self.after(self.policy.select_action(dict(batch))) for _ in range(self.n_action_steps)]
        return torch.cat(actions).float().cpu().numpy()


def converse(connection: ServerConnection, policy: Policy, lock: threading.Lock) -> None:
    """Metadata, then one reply per request; a mistake is one line of text."""
    connection.send(pack(policy.metadata))
    try:
        for data in connection:
            try:
                message = unpack(data) if isinstance(data, bytes) else {}
                wanted = {*policy.metadata["cameras"].values(), *policy.metadata["state"], "prompt"}
                if not isinstance(message, dict) or message.keys() != wanted:
                    raise ValueError(f"a request must have exactly {sorted(wanted)}")
                with lock:
                    reply = pack({"actions": policy.chunk(message), "server_timing": {}})
            except (ValueError, TypeError) as error:
                reply = one_line(str(error))
            connection.send(reply)
    except ConnectionClosed:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy_path", required=True, help="checkpoint of LeRobot: a folder or a Hub id")
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n_action_steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of policies that draw at random (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    policy = Policy(args.policy_path, args.device, args.n_action_steps)
    handler = partial(converse, policy=policy, lock=threading.Lock())
    options = {"compression": None, "max_size": 32 << 20, "origins": [None]}
    with serve(handler, "127.0.0.1", args.port, **options) as server:
        port = server.socket.getsockname()[1]
        print(f"serving {policy.metadata['server']} on ws://127.0.0.1:{port}; Ctrl-C stops", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
