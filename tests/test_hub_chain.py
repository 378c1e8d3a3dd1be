"""From a dataset's upload to an evaluation by ids: our scripts as users start them, against a Hub on loopback.

Each is a process of its own, because huggingface_hub reads HF_ENDPOINT when it is imported.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.backbones import TINY
from support.general import REPOSITORY
from support.hub import LocalHub

pytestmark = pytest.mark.slow

DATASET, POLICY, ADAPTER = "me/pusht_small", "me/pusht_policy", "me/pusht_adapter"
RECORD = f"data_prep/record_pusht.py --num_episodes 2  --push_to_hub {DATASET}"
TRAIN = (
    f"recipes/sft_pusht.py --config recipes/pusht/nano.yaml --dataset_name {DATASET} --max_steps 4 --save_steps 2 "
    "--image_size 48 --chunk_size 4 --n_action_steps 2 --num_eval_episodes 0 --eval_strategy no --save_initial false "
    "--per_device_train_batch_size 4 --report_to none --bf16 false --push_to_hub true"
)
PREDICT = """
import sys, numpy
from vla0_trl import VLAPolicy
policy = VLAPolicy.from_pretrained(sys.argv[1], device="cpu", revision=sys.argv[2])
frame, state = numpy.zeros((96, 96, 3), numpy.uint8), numpy.full(2, 200, numpy.float32)
print(policy.select_action({"images": {"image": frame}, "state": state, "task": "Push."}).shape)
"""


class Machine:
    """Processes with a cache of their own, and one Hub."""

    def __init__(self, hub: LocalHub, home: Path):
        self.hub, self.home = hub, home

    def run(self, *words: str, fails: bool = False) -> str:
        """A script's stdout; its stderr if it is to fail."""
        environment = self.hub.environment(self.home / "hf") | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(REPOSITORY)
        command = [sys.executable, *map(str, words)]
        settings = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True, "timeout": 600}
        done = subprocess.run(command, **settings)
        assert (done.returncode != 0) == fails, done.stderr[-4000:]
        return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with LocalHub() as hub:
        yield Machine(hub, tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def recorded(machine) -> str:
    """A dataset that a converter has uploaded."""
    machine.run(*RECORD.split(), "--output_dir", machine.home / "data")
    return DATASET


def test_the_chain(machine, recorded):
    """One test: every step takes what the one before has uploaded."""
    hub, home = machine.hub, machine.home
    assert hub.repositories["datasets", DATASET].private

    # plain datasets reads it, and streams it in ranges
    code = "import sys, datasets; print(len(datasets.load_dataset(sys.argv[1], split='train')), next(iter("
    code += "datasets.load_dataset(sys.argv[1], split='train', streaming=True)))['task'])"
    rows, task = machine.run("-c", code, DATASET).strip().split(" ", 1)
    assert int(rows) > 20 and task.startswith("Push the T")

    # training by id uploads both checkpoints, then the policy
    out = machine.run(
        *TRAIN.split(), "--nano", json.dumps(TINY), "--hub_model_id", POLICY, "--output_dir", home / "run"
    )
    policy = hub.repositories["models", POLICY]
    assert policy.private and f"at revision {policy.commits[-1].sha}" in out
    messages = [commit.message for commit in policy.commits]
    assert messages[1:] == ["Step 2", "Step 4", "End of training"] or messages[1:] == ["Step 2", "End of training"]
    files = policy.commits[-1].files
    assert {"model.safetensors", "vla_config.json", "checkpoint.json", "README.md"} <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]  # nothing pickled
    assert json.loads(files["checkpoint.json"])["trained_on"]["seeds"] == [0, 1]  # evaluations warn of these
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "robotics" and card.data.datasets == [DATASET] and card.data.base_model is None

    # any revision loads by its hash; an adapter of the uploaded policy names its base by id
    assert machine.run("-c", PREDICT, POLICY, policy.commits[1].sha).strip().endswith("(2,)")
    lora = {"use_peft": "true", "lora_r": 2, "lora_target_modules": "all-linear", "dtype": "float32", "max_steps": 2}
    lora = [word for name, value in lora.items() for word in (f"--{name}", value)]
    words = [*TRAIN.split(), *lora, "--model_name_or_path", POLICY, "--hub_model_id", ADAPTER]
    machine.run(*words, "--output_dir", home / "adapter")
    adapter = hub.repositories["models", ADAPTER].commits[-1].files
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == POLICY
    card = ModelCard(adapter["README.md"].decode())
    assert (card.data.base_model, card.data["base_model_relation"]) == (POLICY, "adapter")
    assert card.data.library_name == "peft"

    # evaluation by id, and its result on the card
    evaluate = f"eval/eval_pusht.py --model_name_or_path {ADAPTER} --num_episodes 2 --num_envs 2 --max_steps 6"
    machine.run(*evaluate.split(), "--num_videos", "0", "--output_dir", home / "eval")
    push = ["eval/push_policy.py", "--model_name_or_path", home / "adapter", "--evaluations", home / "eval"]
    machine.run(*push, "--push_to_hub", ADAPTER)
    [success, coverage] = ModelCard(
        hub.repositories["models", ADAPTER].commits[-1].files["README.md"].decode()
    ).data.eval_results
    assert success.metric_value == 0 and success.metric_args["n"] == 2
    assert success.dataset_args == {"seeds": "100000 to 100001", "execution": "2 steps of each answer"}
    assert coverage.metric_type == "mean_max_coverage"


def test_a_job_takes_its_recipe_by_id_and_goes_on_on_another_machine(machine, recorded):
    hub, home = machine.hub, machine.home
    repository = hub.repositories["datasets", DATASET]
    recipe = (REPOSITORY / "recipes/pusht/nano.yaml").read_bytes()
    repository.commit("recipe", repository.commits[-1].files | {"recipe.yaml": recipe})
    job = ["recipes/jobs/train.py", "--dataset_name", DATASET, "--hub_model_id", "me/job", "--nano", json.dumps(TINY)]
    job += TRAIN.split()[5:-2]  # without script, recipe, dataset and push_to_hub
    machine.run(*job, "--max_steps", "2", "--output_dir", home / "first")
    files = hub.repositories["models", "me/job"].commits[-1].files
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/run.json", "model.safetensors"} <= files.keys()
    out = machine.run(*job, "--max_steps", "4", "--output_dir", home / "second")
    assert f"continuing from {home / 'second' / 'checkpoint-2'}" in out
    assert json.loads((home / "second" / "trainer_state.json").read_text())["global_step"] == 4


def test_a_conversion_by_id_says_what_it_downloads_and_goes_on_after_a_break(machine, written):
    root, hub = written("v3.0", None), machine.hub
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    hub.store("datasets", "lab/arm", files)
    hub.break_downloads, before = 1, len(hub.log)
    command = ["data_prep/convert_lerobot.py", "--source", "lab/arm", "--num_proc", "2"]
    out = machine.run(*command, "--output_dir", machine.home / "arm")
    data = [size for name, size in ((n, len(d)) for n, d in files.items()) if name.startswith("data/")]
    assert f"downloading {len(data)} of {len(data)} files, {sum(data) / 1e9:.2f} GB, of lab/arm" in out
    [broken] = [path for method, path, status, _ in hub.log[before:] if status == 0]
    again = [status for method, path, status, _ in hub.log[before:] if (method, path) == ("GET", broken)]
    assert again in ([0, 200], [0, 206])  # in full below the 10 MB that its client writes at once
    assert "downloading" not in machine.run(*command, "--episodes", "0:1", "--output_dir", machine.home / "one")


def test_a_typo_in_an_id_is_one_line(machine, recorded):
    error = machine.run(
        *TRAIN.replace(DATASET, "me/pusht_smal").split(), "--output_dir", machine.home / "x", fails=True
    )
    assert (
        error.strip()
        .splitlines()[-1]
        .startswith("error: no folder 'me/pusht_smal' here, and no vla_config.json in a Hub")
    )
    words = ["--hub_model_id", "stranger/policy", "--output_dir", machine.home / "x"]
    error = machine.run(*TRAIN.split(), *words, fails=True)
    assert 'rights to create a model under the namespace "stranger"' in error.strip().splitlines()[-1]
