"""FSDP2 without a GPU: runs a script with its arguments, in processes that talk over gloo.

accelerate only shards where it sees one of the accelerators that it knows, PyTorch shards on a CPU just as well. DDP
and DeepSpeed need no such help.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 \
        tests/support/fsdp_on_cpu.py recipes/… …
"""

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
sys.argv.pop(0)
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
