"""A robot of openpi-client's own classes, run by the Python of that client's environment; prints what it saw as JSON.

python openpi_robot.py PORT KEY OBSERVATIONS.npz HORIZON STEPS
"""

import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.runtime.agents.policy_agent import PolicyAgent
from openpi_client.runtime.environment import Environment
from openpi_client.runtime.runtime import Runtime
from openpi_client.websocket_client_policy import WebsocketClientPolicy


class Robot(Environment):
    """Shows the recorded observations, one per step."""

    def __init__(self, messages, steps):
        self.messages, self.steps, self.applied = messages, steps, []

    def reset(self):
        self.step = 0

    def is_episode_complete(self):
        return self.step == self.steps

    def get_observation(self):
        return self.messages[self.step]

    def apply_action(self, action):
        self.applied.append(action["actions"])
        self.step += 1


def error_of(server, message):
    try:
        server.infer(message)
    except RuntimeError as error:
        return str(error)


def main():
    port, key, path, horizon, steps = sys.argv[1:]
    data = np.load(path)
    messages = [
        {"observation/image": image, "observation/state": state, "prompt": str(task)}
        for image, state, task in zip(*(data[name] for name in ("images", "states", "tasks")), strict=True)
    ]
    server = WebsocketClientPolicy("127.0.0.1", int(port), api_key=key or None)
    replies = [server.infer(message) for message in messages]
    result = {
        "metadata": server.get_server_metadata(),
        "actions": [reply["actions"].tobytes().hex() for reply in replies],
        "shape": replies[0]["actions"].shape,
        "errors": [error_of(server, messages[0] | {"observation/depth": 1}), error_of(server, {})],
    }
    robot = Robot(messages, int(steps))
    agent = PolicyAgent(policy=ActionChunkBroker(server, action_horizon=int(horizon)))
    Runtime(environment=robot, agent=agent, subscribers=[], max_hz=100, num_episodes=2).run()
    result["applied"] = np.stack(robot.applied).tolist()
    print(json.dumps(result))


main()
