"""The check of the forward pass in training, with ours broken on purpose: training goes on with transformers' own."""

import pytest
import torch
from support.runs import losses, run
from transformers import AttentionInterface

from vla0_trl.internals import FallbackWarning
from vla0_trl.models import attention
from vla0_trl.models.attention import TrainingForward

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "lora_target_modules": "all-linear"}


@pytest.fixture
def other_attention():
    """Registers an attention in place of ours, until the test ends."""
    yield lambda function: AttentionInterface.register(attention._ATTENTION, function)
    AttentionInterface.register(attention._ATTENTION, attention._attention)


@pytest.fixture(scope="module")
def stock_losses(dot_dataset, tmp_path_factory) -> list[float]:
    """Of a run that never uses ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingForward, "use_fast", lambda self: None)
        return losses(run(dot_dataset, tmp_path_factory.mktemp("stock") / "run"))


def like_values(module, query, key, value, attention_mask, **kwargs):
    """An attention in which each token sees only itself."""
    return value.transpose(1, 2).contiguous(), None


def refused(*args, **kwargs):
    raise TypeError("attention() got an unexpected keyword argument 'sliding_window'")


@pytest.mark.parametrize(
    ("broken", "said"),
    [(like_values, r"it gave tokens a loss that is 0\.\d+ from the stock one on average, of 5\.\d+\. "),
     (refused, r"it raised TypeError: attention\(\) got an unexpected keyword argument 'sliding_window'\. ")],
)  # fmt: skip
def test_another_attention_gives_way_to_stock(broken, said, other_attention, stock_losses, dot_dataset, tmp_path):
    other_attention(broken)
    start = r"fast training of SmolVLM\w+ does not work with transformers \S+, trl \S+, torch \S+: "
    with pytest.warns(
        FallbackWarning, match=start + said + "transformers' forward pass is used from now on"
    ) as warned:
        trained = run(dot_dataset, tmp_path / "run")
    assert [w.category for w in warned].count(FallbackWarning) == 1
    assert losses(trained) == stock_losses


def test_images_that_do_not_arrive_are_noticed(monkeypatch, stock_losses, dot_dataset, tmp_path):
    embed_images = attention._embed_images

    def embed_black_ones(model, args, kwargs):
        return embed_images(model, args, {**kwargs, "pixel_values": torch.zeros_like(kwargs["pixel_values"])})

    monkeypatch.setattr(attention, "_embed_images", embed_black_ones)
    with pytest.warns(FallbackWarning, match=r"it gave tokens a loss that is 0\.\d+ from the stock one"):
        assert losses(run(dot_dataset, tmp_path / "run")) == stock_losses


@pytest.mark.parametrize(
    ("model", "bf16"), [({}, False), ({}, True), (LORA, False)], ids=["full", "bfloat16", "LoRA with dropout"]
)
def test_the_check_changes_no_number_of_a_run(model, bf16, monkeypatch, dot_dataset, tmp_path):
    checks, check = [], TrainingForward.difference
    monkeypatch.setattr(
        TrainingForward, "difference", lambda self, *a: checks.append((check(self, *a), self.way)) or checks[-1][0]
    )
    checked = losses(run(dot_dataset, tmp_path / "checked", model=model, bf16=bf16))
    assert checks == [(None, "fast")]
    monkeypatch.setattr(TrainingForward, "difference", lambda self, *a: setattr(self, "checked", True))
    assert losses(run(dot_dataset, tmp_path / "unchecked", model=model, bf16=bf16)) == checked


def test_where_the_stock_forward_fails_ours_goes_on(monkeypatch, dot_dataset, tmp_path, stock_losses):
    """As SmolVLM's does under bfloat16 autocast in transformers 5.17."""

    def no_attention(*args, **kwargs):
        raise RuntimeError("Index put requires the source and destination dtypes match")

    use_stock = TrainingForward.use_stock
    monkeypatch.setattr(
        TrainingForward, "use_stock", lambda self: (use_stock(self), self.model.set_attn_implementation("none_there"))
    )
    AttentionInterface.register("none_there", no_attention)
    assert losses(run(dot_dataset, tmp_path / "run")) == pytest.approx(stock_losses, rel=1e-4)
