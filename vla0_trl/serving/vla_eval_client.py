"""Model servers of vla-eval (0.8.0: OpenVLA, OFT, SmolVLA, GR00T, …) as a policy for our evaluators.

Their protocol is one observation, one action: the server keeps the rest of a chunk. Each episode has a connection of
its own, which the next one takes over. Messages are msgpack maps of `type, payload, seq, timestamp`; arrays have *str*
keys.
"""

import time
from contextlib import ExitStack
from typing import Any

import numpy as np
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from vla0_trl.config import Observation, VLAConfig
from vla0_trl.envs.libero.protocol import STATE_DIM
from vla0_trl.evaluation.policy_source import PolicyError
from vla0_trl.schema import one_line
from vla0_trl.serving.codec import CodecError, pack, unpack, unpack_array
from vla0_trl.serving.vla_eval import AXIS_ANGLE

SCHEME = "vla-eval://"
VERSION = 1
# A simulator's camera -> their name, and what of `observation_params` asks for it.
CAMERAS = {"image": ("agentview", None), "wrist_image": ("wrist", "send_wrist_image")}


class _Session:
    """One connection, and the episode that it is in."""

    def __init__(self, url: str, timeout_s: float):
        self.timeout_s, self._seq, self.episode = timeout_s, 0, None
        self._stack = ExitStack()  # websockets 17 warns of connections that are not entered
        address = url.replace(SCHEME, "ws://", 1)
        opening = connect(address, compression=None, max_size=None, open_timeout=timeout_s)
        self._socket: ClientConnection = self._stack.enter_context(opening)
        self.send("hello", {"harness_version": "0.8.0", "protocol_version": VERSION})
        self.told: dict[str, Any] = self.receive("hello")

    def begin(self, episode: Any, task: str) -> None:
        self.end()
        self.episode = episode
        self.send("episode_start", {"task": {"name": task}})

    def end(self) -> None:
        if self.episode is not None:
            self.send("episode_end", {})
        self.episode = None

    def send(self, kind: str, payload: dict[str, Any]) -> None:
        self._seq += 1
        self._socket.send(pack({"type": kind, "payload": payload, "seq": self._seq, "timestamp": time.time()}))

    def receive(self, kind: str) -> dict[str, Any]:
        reply = unpack(self._socket.recv(timeout=self.timeout_s))
        if reply["type"] != kind:
            raise PolicyError(one_line(f"vla-eval's server answered {reply['type']}: {reply['payload']}"))
        return reply["payload"]


class VlaEvalPolicy:
    """A model server of vla-eval: asked at every step of every episode, and sent what it asked for.

    Args:
        url (`str`): vla-eval://HOST:PORT.
        simulator ([`VLAConfig`]): cameras, state and actions of the simulator.
        timeout_s (`float`): for a reply.

    Attributes:
        told (`dict`): the server's hello.

    `PolicyError`: no server answers there.
    """

    decoding = "remote"

    def __init__(self, url: str, simulator: VLAConfig, timeout_s: float):
        self.url, self.timeout_s = url, timeout_s
        self.config = simulator.replace(chunk_size=1, n_action_steps=1)
        self._sessions = [self._open()]
        self.told = self._sessions[0].told
        self._params = self.told.get("observation_params", {})

    def reset(self) -> None:
        """All episodes end: the server forgets their chunks; `PolicyError` if it has gone."""
        try:
            for session in self._sessions:
                session.end()
        except (OSError, WebSocketException) as error:
            raise self._lost(error) from error

    def predict_action_chunk(self, observations: list[Observation]) -> np.ndarray:
        """B observations of different episodes, all that are not finished -> float32 (B, 1, action_dim).

        `PolicyError`: the server says that something is wrong, or has gone, or its actions have another shape.
        """
        try:
            sessions = self._sessions_of(observations)
            for session, observation in zip(sessions, observations, strict=True):
                session.send("observation", self._shown(observation))
            actions = [self._action(session.receive("action")) for session in sessions]
        except (OSError, WebSocketException, CodecError) as error:
            raise self._lost(error) from error
        return np.stack(actions)

    def _lost(self, error: Exception) -> PolicyError:
        return PolicyError(f"{self.url} did not answer: {str(error) or type(error).__name__}")

    def _sessions_of(self, observations: list[Observation]) -> list[_Session]:
        """The session of each observation's episode; those of episodes that are over begin new ones."""
        names = [observation["episode"] for observation in observations]
        known = {session.episode: session for session in self._sessions if session.episode in names}
        free = [session for session in self._sessions if session.episode not in names]
        for name, observation in zip(names, observations, strict=True):
            if name not in known:
                if not free:
                    free.append(self._open())
                    self._sessions.append(free[-1])
                known[name] = free.pop()
                known[name].begin(name, observation["task"])
        return [known[name] for name in names]

    def _open(self) -> _Session:
        try:
            return _Session(self.url, self.timeout_s)
        except (OSError, WebSocketException, CodecError) as error:
            raise PolicyError(f"no policy at {self.url}: {str(error) or type(error).__name__}") from error

    def _shown(self, observation: Observation) -> dict[str, Any]:
        asked = {camera: CAMERAS[camera] for camera in self.config.cameras}
        images = {
            name: _array(observation["images"][camera])
            for camera, (name, param) in asked.items()
            if param is None or self._params.get(param)
        }
        shown = {"images": images, "task_description": observation["task"]}
        if self._params.get("send_state"):
            state = np.array(observation["state"], np.float32)
            if len(state) == STATE_DIM and not self._params.get("quat_no_antipodal"):
                state[AXIS_ANGLE] = within_half_a_turn(state[AXIS_ANGLE])
            shown["states"] = _array(state)
        return shown

    def _action(self, payload: dict[str, Any]) -> np.ndarray:
        action = np.asarray(unpack_array(payload.get("actions")), np.float32)
        if action.shape != (self.config.action_dim,) or not np.isfinite(action).all():
            raise PolicyError(
                f"{self.url} answered an action of shape {action.shape}, not ({self.config.action_dim},)"
            )
        return action[None]


def within_half_a_turn(rotation: np.ndarray) -> np.ndarray:
    """robosuite's axis-angle (3,) as vla-eval's LIBERO gives it without `quat_no_antipodal`: up to π."""
    angle = np.linalg.norm(rotation)
    return rotation * (1 - 2 * np.pi / angle) if angle > np.pi else rotation


def _array(value: np.ndarray) -> dict[str, Any]:
    """In their dialect."""
    value = np.ascontiguousarray(value)
    return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
