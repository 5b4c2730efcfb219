"""What is known of models that were trained elsewhere: their data, their limits, their licence, and how they must be
told apart. For the model card of an imported checkpoint, whose record says under `extra.source` what it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPENAI_LICENCE = """\
Modified MIT License

Software Copyright (c) 2021 OpenAI

We don't claim ownership of the content you create with the DALL-E discrete VAE, so it is yours to do with as you
please. We only ask that you use the model responsibly and clearly indicate that it was used.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software. The above copyright notice and this permission notice need not be included with content created by the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


@dataclass(frozen=True)
class Origin:
    """Paragraphs of Markdown. `licence`: of the weights; `limits` come before those that any dVAE has."""

    what: str
    data: str
    recipe: str
    limits: tuple[str, ...]
    licence: str


ORIGINS = {
    "openai": Origin(
        what="the dVAE of DALL·E, as OpenAI published it in 2021 (or another of its form)",
        data=(
            "OpenAI's card says of its model: publicly available text-image pairs from the internet, partly Conceptual "
            "Captions and a filtered subset of YFCC100M; the data was not released."
        ),
        recipe="OpenAI's is in the paper (arXiv 2102.12092, appendix A).",
        limits=(
            "OpenAI's card: made for training generative models on its tokens; not for image processing that must keep "
            "fine detail, and not recommended as an image compressor.",
            "Images whose shorter side is under the size they are brought to (256 pixels in OpenAI's notebook) are "
            "refused, as there. The notebook takes images as they are; here EXIF orientation is applied, and all "
            "become RGB, transparency over white.",
            "Tokens in fp32 are those of OpenAI's code on a CPU. On a GPU its code computes in fp16, where near-ties "
            "may fall to another code.",
        ),
        licence=(
            "OpenAI published its weights under a modified MIT licence. It asks to **indicate clearly that the DALL·E "
            f"discrete VAE was used**, and that this notice goes with every copy:\n\n```text\n{OPENAI_LICENCE}```"
        ),
    ),
    "dalle_pytorch": Origin(
        what="a DiscreteVAE trained with DALLE-pytorch (github.com/lucidrains/DALLE-pytorch)",
        data="The file does not say what it was trained on.",
        recipe="The file does not say how it was trained; DALLE-pytorch's train_vae.py is the usual way.",
        limits=(
            "Images are brought to size as by train_vae.py (bilinear, centre crop), with these differences: the longer "
            "side is rounded where torchvision cuts off (a pixel more in some shapes, none in squares), EXIF "
            "orientation is applied, and transparency lies over white.",
            "Its decoder gives colours without a likelihood: it was trained with a squared or smooth L1 error.",
        ),
        licence=(
            "Not stated: the file has none. DALLE-pytorch's code is under the MIT licence; the weights are their "
            "trainer's to license. (`dvae import --license TEXT` puts it here.)"
        ),
    ),
}


def origin_of(extra: Mapping[str, Any]) -> Origin | None:
    """Of a checkpoint's `extra`; None where it was not imported from elsewhere."""
    source = source_of(extra)
    while source:
        if source.get("kind") in ORIGINS:
            return ORIGINS[source["kind"]]
        source = _mapping(source.get("before"))
    return None


def source_of(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an import recorded; empty where the checkpoint was trained here."""
    return _mapping(extra.get("source"))


def _mapping(value: Any) -> Mapping[str, Any]:
    """A record may come from a stranger."""
    return value if isinstance(value, Mapping) else {}


def stated_licence(extra: Mapping[str, Any]) -> str | None:
    """What the importer said of it, or whoever trained it."""
    return source_of(extra).get("license") or _mapping(extra.get("training_config")).get("license") or None


def source_lines(extra: Mapping[str, Any]) -> list[str]:
    """The files that a checkpoint was made of, with their sha256."""
    files = _mapping(source_of(extra).get("files"))
    return [f"`{name}`, {each['bytes']:,} bytes, sha256 `{each['sha256']}`" for name, each in files.items()]
