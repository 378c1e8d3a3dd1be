"""No setting of TRL's is taken without effect: each is honoured, or refused in one line."""

from dataclasses import fields

import peft
import pytest
import torch
from packaging.version import Version
from support.backbones import QWEN, SMOLVLM, TINY, shrunk
from support.general import REPOSITORY
from support.runs import run
from transformers import AutoModelForImageTextToText
from trl import ModelConfig
from trl import __version__ as TRL

from vla0_trl.models.nano import NanoConfig, build_nano
from vla0_trl.training.arguments import DataArguments, VLASFTConfig, parse_recipe
from vla0_trl.training.run import lora_config, prepare
from vla0_trl.training.settings import NEEDS, REFUSED, check_settings, default

SWEPT = "1.16"  # the TRL whose fields the tables were written for
RENAMED = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # not in the oldest transformers yet
HONOURED = """
    output_dir per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1
    adam_beta2 adam_epsilon max_grad_norm average_tokens_across_devices label_smoothing_factor loss_type
    neftune_noise_alpha router_aux_loss_coef bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_cpu
    gradient_checkpointing activation_checkpointing activation_offloading torch_compile torch_compile_backend
    torch_compile_mode torch_empty_cache_steps auto_find_batch_size use_liger_kernel pad_to_multiple_of
    seed data_seed full_determinism train_sampling_strategy

    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level
    log_level_replica include_num_input_tokens_seen skip_memory_metrics debug disable_tqdm report_to run_name
    eval_strategy eval_on_start load_best_model_at_end metric_for_best_model greater_is_better
    save_strategy save_steps save_total_limit save_only_model save_on_each_node resume_from_checkpoint
    ignore_data_skip restore_callback_states_from_checkpoint push_to_hub

    accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order

    model_name_or_path model_revision dtype attn_implementation use_peft load_in_8bit load_in_4bit

    muon_adamw_learning_rate mask_max mask_skip mask_full mask_branches mask_labels mask_unit
    rows_in_memory freeze_vision nano save_initial stop_at_token_accuracy rollout_steps dagger_steps probe_steps
    log_energy overwrite cotrain_dataset_name
"""

IRRELEVANT = {
    "says how, where another setting says whether (eval_strategy, rollout_steps, report_to). What is learnt does not "
    "change, and a recipe's YAML keeps its value when a command line switches that off": (
        "eval_steps eval_delay per_device_eval_batch_size rollout_episodes project trackio_space_id "
        "trackio_bucket_id trackio_static_space_id"
    ),
    "true is what happens, and false is refused": "completion_only_loss",
    "a recipe always trains, and evaluates where eval_strategy says so; transformers sets them": "do_train do_eval",
    "launchers set it": "local_rank",
}


def listed(table: dict[str, str]) -> list[str]:
    return " ".join(table.values()).split()


KNOWN = [HONOURED.split(), *map(listed, (NEEDS, REFUSED, IRRELEVANT))]
DEFAULTS = {f.name: default(f) for kind in (VLASFTConfig, ModelConfig) for f in fields(kind) if f.init}


def other_than_default(name: str):
    value = DEFAULTS[name]
    return not value if isinstance(value, bool) else 7


def config(tmp_path, **settings) -> VLASFTConfig:
    return VLASFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, **settings)


def model_config(**settings) -> ModelConfig:
    """Checked as a run does."""
    settings = ModelConfig(model_name_or_path="nano", **settings)
    check_settings(settings)
    return settings


def test_every_field_of_trl_is_in_one_table():
    names = [name for table in KNOWN for name in table]
    assert len(names) == len(set(names))
    assert DEFAULTS.keys() - set(names) == set(), "new in TRL: see what reads it, and put it into a table"
    if Version(TRL) >= Version(SWEPT):
        assert set(names) - DEFAULTS.keys() - RENAMED == set(), "gone from TRL"


@pytest.mark.parametrize("name", sorted({*listed(REFUSED), *listed(NEEDS)} & DEFAULTS.keys()))
def test_what_would_do_nothing_is_refused(name, tmp_path):
    make = model_config if name in {f.name for f in fields(ModelConfig)} else lambda **kw: config(tmp_path, **kw)
    with pytest.raises(ValueError, match=rf"^{name}=.* can't be honoured: "):
        make(**{name: other_than_default(name)})


def test_a_switch_makes_its_settings_count(tmp_path):
    assert model_config(use_peft=True, lora_r=4, lora_dropout=0.0).lora_r == 4
    assert model_config(load_in_4bit=True, bnb_4bit_quant_type="fp4").load_in_4bit
    for switch in {"gradient_checkpointing", "activation_checkpointing"} & DEFAULTS.keys():
        config(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": False}, **{switch: True})
    dagger = {"dagger_steps": 2, "dagger_episodes": 3, "dagger_fraction": 0.5, "dagger_teacher": "teacher.safetensors"}
    assert config(tmp_path, **dagger).dagger_episodes == 3
    assert config(tmp_path, completion_only_loss=True).completion_only_loss


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("switch", [{}, {"gradient_checkpointing": True}])
def test_a_renamed_setting_is_not_warned_of(switch, tmp_path):
    """transformers 5.24 warns of `gradient_checkpointing`, which TRL and most recipes set."""
    assert config(tmp_path, **switch).gradient_checkpointing is bool(switch)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"completion_only_loss": False}, "completion_only_loss"),
        ({"max_steps": 5, "num_train_epochs": 2.0}, "num_train_epochs"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 10}, "warmup_steps"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr": 0.1}}, "lr_scheduler_kwargs"),
        ({"loss_type": "dft", "label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"optim": "sgd", "adam_beta2": 0.95}, "adam_beta2"),
        ({"optim": "muon", "optim_args": "eps=1e-3"}, "optim_args"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"mask_skip": 1.0, "mask_max": 0.5}, "mask_max"),
        ({"mask_max": 0.0, "mask_unit": "character"}, "mask_unit"),
    ],
)
def test_settings_that_silence_each_other_are_refused(settings, name, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}=.* can't be honoured: "):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({}, {"load_in_4bit": True}, "load_in_4bit=True can't be honoured"),
        ({}, {"model_revision": "v2"}, "model_revision=v2 can't be honoured: nano is built on the spot"),
        ({"dataset_revision": "v2"}, {}, "dataset_revision=v2 can't be honoured: .* is a folder"),
        ({}, {"lora_r": 4}, "lora_r=4 can't be honoured: use_peft is not set"),
    ],
)
def test_settings_of_another_kind_of_model_or_dataset_are_refused(data, model, message, dot_dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare(
            DataArguments(dataset_name=dot_dataset, **data),
            config(tmp_path, nano=TINY),
            ModelConfig(**{"model_name_or_path": "nano", **model}),
        )


def test_arguments_that_a_schedule_does_not_know_are_one_line(dot_dataset, tmp_path):
    """As `--lr_scheduler_type linear` over a YAML with another schedule's arguments leaves them."""
    settings = config(tmp_path, nano=TINY, lr_scheduler_type="linear", lr_scheduler_kwargs={"min_lr": 1e-6})
    with pytest.raises(ValueError, match=r"^lr_scheduler_kwargs=.* do not fit lr_scheduler_type=linear: .*min_lr"):
        prepare(DataArguments(dataset_name=dot_dataset), settings, ModelConfig(model_name_or_path="nano"))


def test_attention_and_dtype_are_honoured_on_nano(dot_dataset, tmp_path):
    seen = {}

    def look(trainer):
        seen["attention"] = trainer.model.config._attn_implementation
        return []

    run(
        dot_dataset,
        tmp_path / "run",
        {"attn_implementation": "eager", "dtype": "auto"},
        max_steps=1,
        in_simulator=look,
    )
    assert seen == {"attention": "eager"}


@pytest.mark.parametrize("field", ["lora_target_modules", "lora_modules_to_save"])
def test_modules_that_a_model_does_not_have_are_named(field, dot_dataset, tmp_path):
    """One name among others: PEFT adapts the others, and says nothing."""
    model = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(ValueError, match=f"^{field}: the model has no module named nowhere$"):
        run(dot_dataset, tmp_path / "run", model | {field: ["q_proj", "nowhere"]}, max_steps=1)


def nano() -> torch.nn.Module:
    return build_nano(NanoConfig(**TINY))[0]


@pytest.mark.parametrize("backbone", ["nano", SMOLVLM, QWEN])
def test_lora_without_targets_takes_all_linear_layers_but_the_head(backbone, tmp_path):
    """Of language model, connector and image encoder."""
    if backbone == "nano":
        model = nano()
    else:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(shrunk(backbone))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    settings = ModelConfig(model_name_or_path=backbone, use_peft=True)
    adapted = peft.get_peft_model(model, lora_config(settings, config(tmp_path)))
    layers = {name.removeprefix("base_model.model.") for name, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert layers == linear - {"lm_head"}
    for part in ("text_model|language_model", "connector|merger", "vision_model|visual"):
        assert any(word in name for name in layers for word in part.split("|")), part


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [("policy", ["--dagger_steps", "0"]), ("lora", ["--use_peft=false"]), ("lora", ["--use_peft", "False"])],
)
def test_a_switch_turned_off_takes_along_what_the_yaml_sets_for_it(recipe, flags):
    config = REPOSITORY / "recipes" / "pusht" / f"{recipe}.yaml"
    _, training, model_args = parse_recipe(
        config, "", [*flags, "--use_cpu", "true", "--bf16", "false", "--output_dir", "runs/x"]
    )
    assert not training.dagger_steps and training.dagger_teacher is None
    assert not model_args.use_peft and model_args.lora_target_modules is None


def test_another_optimizer_takes_along_the_second_rate_of_muon():
    config = REPOSITORY / "recipes" / "pusht" / "policy.yaml"
    _, training, _ = parse_recipe(config, "", ["--optim", "adamw_torch", "--output_dir", "runs/x"])
    assert training.optim == "adamw_torch" and training.muon_adamw_learning_rate is None


def test_what_the_command_line_sets_beside_a_switch_that_it_turns_off_is_refused():
    config = REPOSITORY / "recipes" / "pusht" / "policy.yaml"
    with pytest.raises(ValueError, match="dagger_episodes"):
        parse_recipe(config, "", ["--dagger_steps", "0", "--dagger_episodes", "7", "--output_dir", "runs/x"])
