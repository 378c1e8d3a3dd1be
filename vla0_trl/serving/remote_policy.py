"""Whatever answers at a URL, as a policy for our evaluators: by openpi's protocol (ours, π0, …) or by vla-eval's."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from vla0_trl.config import Observation, VLAConfig
from vla0_trl.evaluation.arguments import EvaluationArguments
from vla0_trl.evaluation.policy_source import PolicyError, PolicySource
from vla0_trl.serving.client import PolicyConnection, ServerError
from vla0_trl.serving.layouts import LAYOUTS
from vla0_trl.serving.server import PROTOCOL
from vla0_trl.serving.vla_eval_client import SCHEME, VlaEvalPolicy

# Of simulators, for servers whose metadata tell nothing; keys are those of openpi's LIBERO client.
PUSHT = VLAConfig(cameras=["image"], action_dim=2, state_dim=2, use_state=True)
LIBERO = VLAConfig(cameras=["image", "wrist_image"], action_dim=7, state_dim=8, use_state=True, gripper="sign")
TIMEOUT_S = 600.0  # the first chunk may wait for compilation
# Metadata, named as a checkpoint's evaluation records them: what the server decides, and may change results.
RUNNING = ("dtype", "load_in_4bit", "decoding", "refine", "temperature")
AVERAGING = ("ensemble_size", "ensemble_decay", "ensemble_weights")  # if it averages


@dataclass
class RemotePolicy:
    """A policy behind a connection.

    Args:
        connect (`Callable`): opens a connection as `connection` ([`PolicyConnection`]) was, to begin a run.
        config ([`VLAConfig`]): with the server's cameras, dimensions and chunk_size.
        cameras (`dict[str, str]`): camera -> its key in a message.
        state (`str` or `None`), task (`str`): the keys of state and instruction.
        names (`list[str]`): which of `"episode"` and `"noise"` the server is told of each observation.
    """

    connect: Callable[[], PolicyConnection]
    connection: PolicyConnection
    config: VLAConfig
    cameras: dict[str, str]
    state: str | None
    task: str
    names: list[str]
    decoding: ClassVar[str] = "remote"

    def reset(self) -> None:
        """A new connection, for which the server remembers nothing; `PolicyError` if another policy answers there."""
        self.connection.close()
        try:
            connection = self.connect()
        except ServerError as error:
            raise PolicyError(str(error)) from error
        if _told(connection) != _told(self.connection):
            connection.close()
            raise PolicyError(f"another policy is served at {connection.url} now")
        self.connection = connection

    def predict_action_chunk(self, observations: list[Observation]) -> np.ndarray:
        """B observations -> float32 (B, chunk_size, action_dim), as the server answers them, one after another.

        `PolicyError`: the server says that something is wrong, or has gone, or its actions have another shape.
        """
        try:
            replies = self.connection.ask_all([self._message(observation) for observation in observations])
        except ServerError as error:
            raise PolicyError(str(error)) from error
        chunks = [np.asarray(reply.get("actions"), np.float32) for reply in replies]
        wanted = (self.config.chunk_size, self.config.action_dim)
        for chunk in chunks:
            if chunk.shape != wanted or not np.isfinite(chunk).all():
                raise PolicyError(
                    f"{self.connection.url} answered actions of shape {chunk.shape}, wanted {wanted}, all finite"
                )
        return np.stack(chunks)

    def _message(self, observation: Observation) -> dict[str, Any]:
        message = {key: observation["images"][camera] for camera, key in self.cameras.items()}
        if self.state is not None:
            message[self.state] = np.asarray(observation["state"], np.float64)
        message |= {name: str(observation[name]) for name in self.names if name in observation}
        return message | {self.task: observation["task"]}


def remote_policy(args: EvaluationArguments, simulator: VLAConfig) -> PolicySource:
    """The policy at `args.policy`, ws://… or vla-eval://…; a server of openpi's is asked once, to learn its chunk.

    Args:
        simulator ([`VLAConfig`]): `PUSHT` or `LIBERO`: what is sent to servers that do not say what they need.

    `ValueError`: no server answers there, it is for another robot, or there are flags that it can't be given.
    """
    useless = {"device": None, "dtype": None, "temperature": None}
    useless |= {"load_in_4bit": False, "decoding": "exact", "refine": 0}
    if given := [name for name, default in useless.items() if vars(args)[name] != default]:
        raise ValueError(f"--{given[0]} would do nothing with --policy: the server decides how its model runs")
    if args.policy.startswith(SCHEME):
        return _vla_eval_policy(args, simulator)
    key = args.policy_key_file and args.policy_key_file.read_text().strip()
    connect = partial(PolicyConnection, args.policy, key, TIMEOUT_S)
    try:
        connection = connect()
        ours = connection.metadata.get("protocol") == PROTOCOL and "cameras" in connection.metadata
        policy = _speaking(connect, connection) if ours else _silent(connect, connection, simulator)
    except (ServerError, PolicyError) as error:
        raise ValueError(str(error)) from error
    return _source(args.policy, _told(connection), policy, "openpi's protocol")


def _told(connection: PolicyConnection) -> dict[str, Any]:
    """The metadata that stay the same."""
    return {name: value for name, value in connection.metadata.items() if name != "latency_ms"}


def _vla_eval_policy(args: EvaluationArguments, simulator: VLAConfig) -> PolicySource:
    given = [name for name in ("n_action_steps", "ensemble_size") if vars(args)[name] is not None]
    if args.policy_key_file is not None or given:
        name = given[0] if given else "policy_key_file"
        raise ValueError(f"--{name} would do nothing with {SCHEME}…: its server executes chunks, and knows no key")
    try:
        policy = VlaEvalPolicy(args.policy, simulator, TIMEOUT_S)
    except PolicyError as error:
        raise ValueError(str(error)) from error
    return _source(args.policy, policy.told, policy, "vla-eval's protocol")


def _source(url: str, told: dict[str, Any], policy: RemotePolicy | VlaEvalPolicy, protocol: str) -> PolicySource:
    """`told`: what the server said of itself; without a `revision` it may be any model, known by its address alone."""

    def load(config: VLAConfig) -> RemotePolicy | VlaEvalPolicy:
        policy.config = config
        return policy

    described = hashlib.sha256(json.dumps([url, told], sort_keys=True, default=str).encode()).hexdigest()
    decided = RUNNING + (AVERAGING if told.get("ensemble_size", 1) > 1 else ())
    return PolicySource(
        checkpoint=url,
        checkpoint_hash=told.get("revision") or described,
        identified=bool(told.get("revision")),
        config=policy.config,
        protocol={"policy": protocol} | {name: told[name] for name in decided if told.get(name)},
        device="remote",
        trained_on=set(),
        load=load,
    )


def _speaking(connect: Callable[[], PolicyConnection], connection: PolicyConnection) -> RemotePolicy:
    """Of a server that says what it sees: eval/serve.py, eval/baselines/."""
    told = connection.metadata
    if len(told["state"]) > 1:
        raise ValueError(f"{connection.url} wants the state in parts, {told['state']}: not a simulator's layout")
    averages = told["ensemble_size"] > 1  # then the server does, and answers one action
    config = VLAConfig(
        cameras=list(told["cameras"]),
        action_dim=told["action_dim"],
        state_dim=told["state_dim"],
        chunk_size=1 if averages else told["chunk_size"],
        n_action_steps=1 if averages else told["n_action_steps"],
        use_state=told["state_dim"] > 0,
    )
    state = told["state"][0] if told["state"] and told["state_dim"] else None
    names = [name for name in ("episode", "noise") if name in told["options"]]
    return RemotePolicy(connect, connection, config, told["cameras"], state, told["task"], names)


def _silent(
    connect: Callable[[], PolicyConnection], connection: PolicyConnection, simulator: VLAConfig
) -> RemotePolicy:
    """Of a server that has no such metadata, such as openpi's: it is shown what the simulator has."""
    layout = LAYOUTS["libero"]
    keys = {names[0]: key for key, names in layout.images.items()}
    cameras = {camera: keys[camera] for camera in simulator.cameras}
    policy = RemotePolicy(connect, connection, simulator, cameras, layout.state[0], layout.task, names=[])
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    shown = {"images": dict.fromkeys(cameras, noise), "state": np.zeros(simulator.state_dim), "task": "wait"}
    shape = np.shape(connection.ask(policy._message(shown)).get("actions"))
    if len(shape) != 2 or shape[1] != simulator.action_dim:
        raise PolicyError(f"{connection.url} answers actions of shape {shape}, not (n, {simulator.action_dim})")
    policy.config = simulator.replace(chunk_size=shape[0], n_action_steps=shape[0])
    return policy
