"""A checkpoint drives robots over the network, by openpi's websocket protocol: the server, and the robot's client.

In: messages of clients such as openpi-client's. Out: chunks of actions, ready to execute. Read `server.py` first, then
`layouts.py` (which keys a robot sends) and `engine.py` (one thread asks the policy); `client.py` runs on the robot.
"""
