"""The model card: what a model is, what it learnt from, how good it is and what it cannot do, as Markdown.

Made of the checkpoint's own record, so that it can be made again; no URL in it has credentials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.model_origin import Origin, origin_of, source_lines, stated_licence
from jobs.train_health import standing
from model.config import ArchitectureConfig, model_config
from pipeline.urls import public_url

CARD = "MODEL_CARD.md"
Settings = Mapping[str, Any]

FIGURES = {  # name -> what it says, in the order of the table
    "psnr_hard": ("PSNR from tokens", "dB", "{:.2f}"),
    "psnr_soft": ("PSNR of the relaxed latent", "dB", "{:.2f}"),
    "ssim_hard": ("SSIM from tokens", "", "{:.4f}"),
    "ssim_soft": ("SSIM of the relaxed latent", "", "{:.4f}"),
    "lpips_hard": ("LPIPS from tokens", "", "{:.4f}"),
    "rfid": ("rFID from tokens", "", "{:.2f}"),
    "nats_per_value": ("loss of the reconstruction", "nats a value", "{:.4f}"),
    "squared_error": ("squared error of the relaxed latent", "a value", "{:.5f}"),
    "absolute_error": ("absolute error of the relaxed latent", "a value", "{:.4f}"),
    "bits_per_image": ("bits an image, by the entropy of the codes", "", "{:,.0f}"),
    "raw_bits_per_image": ("bits an image, as integers", "", "{:,.0f}"),
    "code_entropy_bits": ("entropy of the codes", "bits a token", "{:.2f}"),
    "used_share": ("codes in use", "", "{:.1%}"),
    "dead_codes": ("dead codes", "", "{:,.0f}"),
    "perplexity": ("perplexity of the codes", "", "{:,.0f}"),
    "information": ("information, I(x; z)", "nats a position", "{:.3f}"),
    "usage_kl": ("KL of the mean posterior to uniform", "nats", "{:.3f}"),
    "posterior_entropy": ("entropy of the posterior", "nats", "{:.3f}"),
}
LIMITS = (
    "Reconstruction loses detail: small text, faces in a crowd and fine texture come back changed.",
    "It knows what its training images show; other kinds of images may use few codes and reconstruct badly.",
    "It encodes and decodes. To make new images, a prior over its tokens has to be trained.",
    "No image was filtered for content by training itself: what the data holds, the model has seen.",
)


@dataclass(frozen=True)
class CardFacts:
    """`figures` are those of one evaluation; `source` says of which images. `training` is the public part of the
    training settings, None where the checkpoint does not say."""

    tokenizer_id: str
    model: ArchitectureConfig
    image_spec: Mapping[str, Any]
    step: int
    training: Settings | None = None
    figures: Mapping[str, float] | None = None
    source: str = ""
    warnings: Sequence[str] = ()
    extra: Settings = field(default_factory=dict)  # of the checkpoint: where it was imported from, if it was
    has_decoder: bool = True

    @property
    def origin(self) -> Origin | None:
        return origin_of(self.extra)


def card_of_training(record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Of a finished run: its model's checkpoint.json, and metrics.jsonl."""
    figures = next((line for line in reversed(lines) if line["kind"] == "eval"), None)
    source = "" if figures is None else (
        f"On {figures['num_images']:,} held-out images, by training's last evaluation (step {figures['step']:,})."
    )  # fmt: skip
    warnings = [finding["text"] for finding in standing(lines)]
    return model_card(replace(facts_of(record), figures=figures, source=source, warnings=warnings))


def facts_of(record: Mapping[str, Any]) -> CardFacts:
    """What a checkpoint.json says."""
    return CardFacts(
        tokenizer_id=record["tokenizer_id"],
        model=model_config(record["model"]),
        image_spec=record["image_spec"],
        step=record["step"],
        training=record["extra"].get("training_config"),
        extra=record["extra"],
        has_decoder=record.get("has_decoder", True),
    )


def model_card(facts: CardFacts) -> bytes:
    sections = (
        _what(facts),
        _use(facts),
        _data(facts),
        _recipe(facts),
        _figures(facts),
        _limits(facts),
        _licence(facts),
    )
    return ("\n\n".join("\n".join(section) for section in sections) + "\n").encode()


def figure_rows(figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """(what, value with its unit) of those that are there, in a fixed order."""
    for name, (what, unit, form) in FIGURES.items():
        if (value := figures.get(name)) is not None:
            yield what, f"{form.format(value)} {unit}".rstrip()


def _what(facts: CardFacts) -> Iterator[str]:
    model, size = facts.model, facts.image_spec["size"]
    rows, columns = model.grid(size)
    yield f"# dVAE image tokenizer: {rows} × {columns} tokens of {model.codebook_size:,} codes"
    yield ""
    bits = rows * columns * math.log2(model.codebook_size)
    yield (
        f"A discrete VAE: {size} × {size} pixels become {rows * columns:,} tokens, at most {bits:,.0f} bits, and back. "
        f"{model.in_words()} Tokenizer `{facts.tokenizer_id}`, step {facts.step:,}."
    )
    if facts.origin is not None:
        yield f"\nImported by `dvae import`: {facts.origin.what}. The weights come from:\n"
        yield from (f"- {line}" for line in source_lines(facts.extra))
    if not facts.has_decoder:
        yield "\n**An encoder alone:** it makes tokens; to make pictures of them, import it with its decoder."


def _use(facts: CardFacts) -> Iterator[str]:
    yield "## Use\n"
    yield "```\ndvae tokenize tokenize.yaml checkpoint=THIS_FOLDER shards='SHARDS/*.tar' output=TOKENS\n```\n"
    yield "```python\nfrom jobs.api import load_tokenizer\n"
    yield 'tokenizer = load_tokenizer("THIS_FOLDER")'
    decoding = "\npixels_BHWC = tokenizer.decode(tokens_BHW)" if facts.has_decoder else ""
    yield f'tokens_BHW = tokenizer.encode(["cat.jpg"]){decoding}\n```\n'
    spec = facts.image_spec
    yield (
        f"Images are brought to {spec['size']} pixels by the image spec in `checkpoint.json` (resample "
        f"`{spec.get('resample', 'lanczos')}`), which `dvae` applies by itself; tokens are the argmax, without noise."
    )


def _data(facts: CardFacts) -> Iterator[str]:
    yield "## Data\n"
    if facts.training is None:
        yield "The checkpoint does not say what it was trained on." if facts.origin is None else facts.origin.data
        return
    data = facts.training["data"]
    for name, what in (("train_shards", "Trained on"), ("val_shards", "Held out")):
        yield f"- {what}: {', '.join(f'`{public_url(url)}`' for url in data[name]) or 'nothing'}"
    seen = facts.step * facts.training["batch_size"]
    yield f"- Images seen, repeats included: {seen:,}; augmentation `{data['augment']}`"


def _recipe(facts: CardFacts) -> Iterator[str]:
    yield "## Recipe\n"
    if facts.training is None:
        yield "The checkpoint does not say how it was trained." if facts.origin is None else facts.origin.recipe
        return
    settings = facts.training
    yield (
        f"{facts.step:,} updates of {settings['batch_size']:,} images in {settings['precision']}, seed "
        f"{settings['seed']}; likelihood `{settings['loss']['likelihood']}`; AdamW at {settings['optim']['lr']:g}, "
        f"weights averaged with decay {settings['optim']['ema_decay']:g}.\n"
    )
    yield "| schedule | start | end | steps |\n|---|---|---|---|"
    for name, ramp in settings["schedule"].items():
        yield f"| {name} | {ramp['start']:g} | {ramp['end']:g} | {ramp['steps']:,} |"
    yield "\nEvery setting is in `checkpoint.json`, under `extra.training_config`."


def _figures(facts: CardFacts) -> Iterator[str]:
    yield "## Figures\n"
    if facts.figures is None:
        yield "Never evaluated: `dvae eval THIS_FOLDER SHARDS` does."
        return
    yield f"{facts.source}\n"
    yield "| figure | value |\n|---|---|"
    yield from (f"| {what} | {value} |" for what, value in figure_rows(facts.figures))


def _limits(facts: CardFacts) -> Iterator[str]:
    yield "## Limits\n"
    yield from (f"- {limit}" for limit in (*(facts.origin.limits if facts.origin else ()), *LIMITS))
    yield from (f"- At the last evaluation: {warning}" for warning in facts.warnings)


def _licence(facts: CardFacts) -> Iterator[str]:
    yield "## Licence\n"
    stated = stated_licence(facts.extra) or (facts.training or {}).get("license")
    if facts.origin is not None and not stated:
        yield facts.origin.licence
        return
    yield (
        stated or "Not stated. (Whoever trains sets `license` in the settings; the licences of the images matter too.)"
    )
