"""The model's configuration is checked once, as it is made, and names what is wrong."""

from __future__ import annotations

import pytest

from model.config import DVAEConfig, LossConfig, ModelError, OptimConfig, Ramp, ScheduleConfig


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DVAEConfig(codebook_size=1), ("codebook_size", "1", "at least 2")),
        (lambda: DVAEConfig(downsample=6), ("downsample", "6", "4, 8, 16")),  # type: ignore[arg-type]
        (lambda: DVAEConfig(width=90), ("width", "90", "multiple of 4")),
        (lambda: DVAEConfig(head="dot"), ("head", "'dot'", "inner_product")),  # type: ignore[arg-type]
        (lambda: DVAEConfig(stem="slow"), ("stem", "'slow'", "strided")),  # type: ignore[arg-type]
        (lambda: LossConfig(likelihood="l3"), ("likelihood", "l3", "logit_laplace")),  # type: ignore[arg-type]
        (lambda: OptimConfig(lr=0.0), ("lr", "0.0", "above 0")),
        (lambda: OptimConfig(lr=float("nan")), ("lr", "nan", "finite")),
        (lambda: OptimConfig(betas=(0.9, 1.0)), ("betas", "1.0", "[0, 1)")),
        (lambda: OptimConfig(grad_clip=-1.0), ("grad_clip", "-1.0", "above 0")),
        (lambda: OptimConfig(ema_decay=1.0), ("ema_decay", "1.0", "[0, 1)")),
        (lambda: Ramp(1.0, 0.5, 0), ("steps", "0", "at least 1")),
        (lambda: Ramp(-1.0, 0.5, 10), ("start", "-1.0", "zero or more")),
        (lambda: ScheduleConfig(temperature=Ramp(1.0, 0.0, 10)), ("temperature.end", "0.0", "above 0")),
        (lambda: ScheduleConfig(temperature=Ramp(1.0, 0.5, 10, warmup=5)), ("temperature.warmup", "5")),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_its_value_and_the_rule(make, words):
    with pytest.raises(ModelError) as caught:
        make()
    assert all(word in str(caught.value) for word in words)


def test_the_defaults_are_the_papers():
    optim, schedules = OptimConfig(), ScheduleConfig()
    assert DVAEConfig().to_json() == {
        "codebook_size": 8192,
        "downsample": 8,
        "width": 256,
        "blocks_per_group": 2,
        "decoder_init": 128,
        "head": "conv",
        "code_dim": 128,
        "stem": "full",
    }
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay) == (1e-4, (0.9, 0.999), 1e-8, 1e-4)
    assert schedules.temperature == Ramp(1.0, 1 / 16, 150_000)
    assert schedules.kl_weight == Ramp(0.0, 6.6, 5_000)
    assert optim.lr * schedules.lr.end == pytest.approx(1.25e-6)


def test_a_model_config_survives_json_and_refuses_unknown_fields():
    config = DVAEConfig(codebook_size=512, head="inner_product", stem="strided", downsample=16)
    assert DVAEConfig.from_json(config.to_json()) == config
    with pytest.raises(ModelError, match="unknown field 'widht'"):
        DVAEConfig.from_json({"widht": 3})


@pytest.mark.parametrize(
    ("stem", "downsample", "multiples"),
    [
        ("full", 4, (1, 2, 4)),
        ("full", 8, (1, 2, 4, 8)),
        ("full", 16, (1, 2, 4, 8, 8)),
        ("strided", 4, (1,)),
        ("strided", 8, (1, 2)),
        ("strided", 16, (1, 2, 4)),
    ],
)
def test_groups_double_in_width_up_to_eight_times(stem, downsample, multiples):
    config = DVAEConfig(width=4, stem=stem, downsample=downsample)
    assert config.group_widths == tuple(4 * each for each in multiples)


def test_the_grid_follows_from_the_image_size_or_is_refused():
    assert DVAEConfig(downsample=8).grid(256) == (32, 32)
    for size in (0, 4, 100):
        with pytest.raises(ModelError, match=f"image size {size} is not a multiple of downsample 8"):
            DVAEConfig(downsample=8).grid(size)
