"""The list of checks, and the process of one: `python -m vla0_trl.check.checks NAME OUTPUT_DIR`."""

import sys
from pathlib import Path

from vla0_trl import pip_install
from vla0_trl.check import machine, parts
from vla0_trl.check.process import Check, answer_for

CHECKS = {
    "packages": Check("packages", machine.packages, f"pip install -c {machine.LOCK} -e ."),
    "disk": Check("disk", machine.disk, "give a folder on a local disk with --output_dir"),
    "hub": Check("Hugging Face Hub", machine.hub, "pip install --force-reinstall huggingface_hub"),
    "gpu": Check("GPU", machine.gpu, "install a torch that is built for this GPU and driver"),
    "adam_8bit": Check("8-bit Adam", machine.adam_8bit, machine.ADAM_FIX),
    "pusht": Check("PushT", parts.pusht, "pip install --force-reinstall gym-pusht pygame"),
    "libero": Check("LIBERO", parts.libero, pip_install("libero")),
    "libero_assets": Check("LIBERO's assets", parts.libero_assets, "export LIBERO_ASSETS=PATH"),
    "libero_osmesa": Check("LIBERO by osmesa", parts.libero_osmesa, "apt-get install libosmesa6"),
    "libero_egl": Check("LIBERO by egl", parts.libero_egl, "apt-get install libegl1, or export MUJOCO_GL=osmesa"),
    "video": Check("mp4", parts.video, parts.VIDEO_FIX),
    "policy": Check("nano policy", parts.policy, f"pip install -c {machine.LOCK} -e ."),
    "serving": Check("policy server", parts.serving, pip_install("serve")),
}


if __name__ == "__main__":
    answer_for(CHECKS[sys.argv[1]], Path(sys.argv[2]))
