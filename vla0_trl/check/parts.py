"""Probes of what the project runs: simulators that draw, LIBERO's assets, an mp4, a policy that answers.

As in `machine.py`, everything but the standard library is imported inside the probe that needs it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vla0_trl import pip_install
from vla0_trl.check.process import FAILURE, OK, WARNING, Finding, unexpected_end_means

if TYPE_CHECKING:
    from vla0_trl import VLAPolicy

VIDEO_FIX = 'pip install --force-reinstall av "imageio[ffmpeg]"'


def pusht(_: Path) -> Finding:
    """A frame of PushT."""
    begin = time.perf_counter()
    from vla0_trl.envs.pusht.env import CAMERA, PushTEnv

    env = PushTEnv()
    env.reset(seed=0)
    return _drawn(begin, lambda: env.observe()["images"][CAMERA])


def _drawn(begin: float, draw: Callable, change: Callable = lambda: None) -> Finding:
    """A picture is there if it isn't one colour; told with the time of the first, and of another after `change`."""
    first = draw()
    ready = time.perf_counter() - begin
    if first.std() < 1:
        return Finding(FAILURE, "the frame is empty", "update the graphics driver, or choose another renderer")
    change()
    begin = time.perf_counter()
    height, width, _ = draw().shape
    ms = 1000 * (time.perf_counter() - begin)
    return Finding(OK, f"{width} × {height} px drawn in {ms:.1f} ms; {ready:.1f} s from start to the first frame")


def libero(_: Path) -> Finding:
    """LIBERO's packages, and MuJoCo in the version that was tested."""
    if find_spec("libero") is None:
        return Finding(WARNING, "the simulator is not installed", pip_install("libero"))
    from vla0_trl.envs.libero.protocol import TESTED_MUJOCO

    if version("mujoco") != TESTED_MUJOCO:
        text = f"MuJoCo {version('mujoco')}, but {TESTED_MUJOCO} is what was tested: scores differ between versions"
        return Finding(FAILURE, text, f"pip install mujoco=={TESTED_MUJOCO}")
    return Finding(OK, ", ".join(f"{name} {version(name)}" for name in ("hf-libero", "robosuite", "mujoco")))


def libero_assets(_: Path) -> Finding | None:
    """LIBERO's meshes and textures, without downloading them."""
    if find_spec("libero") is None:
        return None
    from vla0_trl.envs.libero.setup import ASSETS_REPOSITORY, ASSETS_VARIABLE, LiberoError, find_assets

    try:
        return Finding(OK, str(find_assets(download=False)))
    except LiberoError as error:
        fix = f"export {ASSETS_VARIABLE}=PATH, or hf download --repo-type dataset {ASSETS_REPOSITORY}"
        if os.environ.get(ASSETS_VARIABLE):
            return Finding(FAILURE, str(error), fix)
        return Finding(WARNING, "not on this machine; the first evaluation or recording downloads them", fix)


def libero_osmesa(_: Path) -> Finding | None:
    """A frame of LIBERO, drawn on the CPU."""
    return _libero_frame("osmesa", "apt-get install libosmesa6")


def libero_egl(_: Path) -> Finding | None:
    """A frame of LIBERO, drawn on the GPU."""
    return _libero_frame("egl", "install the NVIDIA driver and libegl1")


def _libero_frame(renderer: str, fix: str) -> Finding | None:
    if find_spec("libero") is None:
        return None
    begin = time.perf_counter()
    from vla0_trl.envs.libero.env import LiberoEnv
    from vla0_trl.envs.libero.protocol import SETTLING_ACTION
    from vla0_trl.envs.libero.setup import LiberoError, choose_renderer, find_assets

    try:
        assets = find_assets(download=False)
    except LiberoError:
        return Finding(WARNING, "not tried: it needs LIBERO's assets", "see `LIBERO's assets`")
    try:
        needed = choose_renderer()
    except LiberoError:
        needed = "osmesa"
    if needed != renderer:
        unexpected_end_means(WARNING, f"nothing to fix while {needed} draws; else {fix}")
    os.environ |= {"MUJOCO_GL": renderer, "PYOPENGL_PLATFORM": renderer}
    env = LiberoEnv("libero_object", 0, cameras=("image",), assets_dir=assets)
    env.reset(seed=0)
    return _drawn(begin, lambda: env.observe()["images"]["image"], lambda: env.step(SETTLING_ACTION))


def video(_: Path) -> Finding:
    """An mp4 written as evaluations do, and decoded as conversions do."""
    if find_spec("av") is None:
        return Finding(WARNING, "no reader of mp4 is installed", pip_install("convert"))
    import av
    import numpy as np

    from vla0_trl.data.sources.video import VideoReader
    from vla0_trl.evaluation.episode_log import write_video

    written = [np.full((64, 64, 3), grey, np.uint8) for grey in (40, 120, 200)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.mp4"
        write_video(path, written, fps=10)
        read = list(VideoReader(path, fps=10).frames(np.arange(3) / 10, "the check", alone=True))
    worst = max(float(np.abs(np.subtract(a, b, dtype=float)).max()) for a, b in zip(read, written, strict=True))
    if worst > 10:
        return Finding(FAILURE, f"decoded colours differ by {worst:.0f} of 255", VIDEO_FIX)
    if "libdav1d" not in av.codecs_available:  # LeRobot's default
        return Finding(WARNING, "h264 is written and decoded; AV1 can't be decoded", VIDEO_FIX)
    return Finding(OK, f"h264 is written and decoded, AV1 can be (PyAV {av.__version__})")


def policy(_: Path) -> Finding:
    """A chunk of actions, decoded by a nano policy with random weights."""
    import numpy as np

    nano = _nano_policy()
    image, state = np.zeros((96, 96, 3), np.uint8), np.zeros(2, np.float32)
    begin = time.perf_counter()
    chunk = nano.predict_action_chunk([{"images": {"image": image}, "state": state, "task": "Push it."}])
    seconds = time.perf_counter() - begin
    if not np.isfinite(chunk).all():
        return Finding(FAILURE, f"the actions are {chunk.tolist()}", "file an issue with the output of --json")
    text = f"{chunk.size} numbers decoded on {nano.model.device} in {seconds:.2f} s, the first time"
    if nano.decoding == "stock":
        fix = "nothing to fix: answers are right, but slower; file an issue with the output of --json"
        return Finding(WARNING, f"{text}; fast decoding failed its check, see eval/README.md", fix)
    return Finding(OK, text)


def serving(_: Path) -> Finding:
    """A chunk of actions, from a nano policy behind a websocket on this machine."""
    if find_spec("websockets") is None or find_spec("msgpack") is None:
        return Finding(WARNING, "what eval/serve.py needs is not installed", pip_install("serve"))
    import asyncio
    import ssl

    from vla0_trl.serving.client import PolicyConnection
    from vla0_trl.serving.engine import Engine
    from vla0_trl.serving.layouts import LAYOUTS
    from vla0_trl.serving.requests import RequestReader
    from vla0_trl.serving.server import PolicyServer, ServerOptions

    nano = _nano_policy()
    reader = RequestReader(LAYOUTS["plain"], nano.config)
    engine = Engine(nano, max_batch=1)
    engine.warm_up(reader.read(reader.example()))
    engine.start()

    def ask(port: int) -> float:
        connection = PolicyConnection(f"ws://127.0.0.1:{port}")
        begin = time.perf_counter()
        connection.ask(reader.example())
        seconds = time.perf_counter() - begin
        connection.close()
        return seconds

    async def serve_one() -> float:
        async with PolicyServer(engine, reader, ServerOptions(port=0)) as server:
            return await asyncio.to_thread(ask, server.port)

    seconds = asyncio.run(serve_one())
    engine.stop()
    return Finding(OK, f"a chunk over ws:// in {seconds * 1000:.0f} ms; wss:// by {ssl.OPENSSL_VERSION}")


def _nano_policy() -> VLAPolicy:
    """Random weights, on the GPU if there is one."""
    import numpy as np

    from vla0_trl import NormStats, VLAConfig, VLAPolicy
    from vla0_trl.models.nano import build_nano
    from vla0_trl.policy.policy import resolve_device

    stats = NormStats.from_array(np.float32([[0, 0], [512, 512]]))
    config = VLAConfig(action_dim=2, state_dim=2, use_state=True, image_size=96, action_stats=stats, state_stats=stats)
    model, processor = build_nano()
    device, dtype = resolve_device()
    return VLAPolicy(model.to(device, dtype).eval(), processor, config)
