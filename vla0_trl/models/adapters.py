"""LoRA adapters: loading them whole, going on from them, and merging them into their base model."""

from collections import defaultdict
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedModel

from vla0_trl.models.weights import not_loaded, refuse_weights
from vla0_trl.schema import one_line


def load_adapter(base: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """The adapter in `folder` on its base model. PEFT itself leaves what is missing at its initial value.

    `ValueError` if weights are missing, unexpected, or do not fit the base model.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: save the adapter as safetensors")
    try:
        model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    except KeyError as error:  # PEFT's, of a module that was trained whole
        raise ValueError(f"{folder}: 1 weights are missing: {one_line(error.args[0])}") from error
    except RuntimeError as error:  # torch's, of shapes that differ
        raise ValueError(f"{folder} does not fit its base model {base.name_or_path}: {one_line(error)}") from error
    except Exception as error:  # whatever a wrong value in its config leads to
        raise not_loaded(folder, error) from error
    # What is saved from now on names the base model where it was found.
    model.peft_config[model.active_adapter].base_model_name_or_path = base.name_or_path
    with safe_open(file, "pt") as stored_tensors:
        stored = set(stored_tensors.keys())
    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    refuse_weights(folder, "missing", expected - stored)
    refuse_weights(folder, "unexpected", stored - expected - model.state_dict().keys())  # PEFT may add embeddings
    return model


def check_named_modules(model: PeftModel) -> None:
    """`ValueError` if a name among an adapter's modules is not one of the model's; PEFT passes over it if another is.

    A single name or a pattern is PEFT's own to check.
    """
    config = model.peft_config[model.active_adapter]
    names = [f".{name}" for name, _ in model.get_base_model().named_modules()]
    wanted = {"lora_target_modules": config.target_modules, "lora_modules_to_save": config.modules_to_save}
    for field, modules in wanted.items():
        modules = () if modules is None or isinstance(modules, str) else sorted(modules)
        absent = [module for module in modules if not any(name.endswith(f".{module}") for name in names)]
        if absent:
            raise ValueError(f"{field}: the model has no module named {', '.join(absent)}")


def check_tied_targets(model: PeftModel) -> None:
    """`ValueError` if an adapter changes one of two layers that share their weight.

    Trained, it acts on that layer alone; merged, it would change the other one, too: the input embedding and the
    output head of most small language models.
    """
    shared = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)].append(name)
    for names in shared.values():
        targets = [name for name in names if ".base_layer." in name]
        if 0 < len(targets) < len(names):
            other = next(name for name in names if name not in targets)
            raise ValueError(
                f"the adapter's target {targets[0].removesuffix('.base_layer.weight')} shares its weight with "
                f"{other}, which merging would change as well: leave it out of lora_target_modules, or train it whole "
                "(lora_modules_to_save)"
            )


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Base model and adapter as one model, whose config says whether input and output embeddings are still tied."""
    whole = model.merge_and_unload()
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    whole.config.tie_word_embeddings = whole.config.get_text_config().tie_word_embeddings = tied
    return whole
