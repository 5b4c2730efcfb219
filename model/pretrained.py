"""Which model a foreign file holds, and its weights under our names: OpenAI's dVAE, or DALLE-pytorch's.

Names and shapes are held against the architecture that the weights themselves speak of; the first mismatch is named,
as the file names it. Reading files is foreign_file.py's, DALLE-pytorch's architecture discrete_vae.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import DVAEConfig, ModelConfig, ModelError
from model.discrete_vae import from_hparams
from model.dvae import DVAE
from model.foreign_file import ForeignFile
from model.foreign_modules import check_layers, state_dict
from model.foreign_names import ForeignFileError, Instance, TensorRef

Kind = Literal["openai", "dalle_pytorch"]
Side = Literal["encoder", "decoder"]
MODULE_SIDES: dict[str, Side] = {"dall_e.encoder Encoder": "encoder", "dall_e.decoder Decoder": "decoder"}
# Before the names of an encoder's or a decoder's tensors, where both lie in one state dict.
PREFIXES = ("", "encoder.", "decoder.", "enc.", "dec.")
FIRST, LAST = "blocks.input.w", "blocks.output.conv.w"
MAX_HPARAM = 1 << 20  # codes, channels, pixels
MAX_TEXT = 200
MAX_BLOCKS = 64  # of a group; the published one has 2
WRAPPERS = ("state_dict", "model")
WHAT_IS_READ = (
    "dvae import reads OpenAI's encoder.pkl and decoder.pkl, state dicts of their names, DALLE-pytorch's vae.pt and "
    "dalle.pt, and checkpoints of dvae"
)


@dataclass(frozen=True)
class Pretrained:
    """`image_size` None: the source does not say it. `stored_as`: the types that the weights had."""

    kind: Kind
    config: ModelConfig
    weights: dict[str, Tensor]
    image_size: int | None
    has_decoder: bool
    stored_as: tuple[str, ...]


@dataclass(frozen=True)
class _Half:
    """An encoder's or a decoder's tensors by the names of its own state dict. `prefix`: what the file writes before
    them. `module`: what it was pickled as, where it was."""

    side: Side
    file: ForeignFile
    prefix: str
    refs: Mapping[str, TensorRef]
    module: Instance | None = None

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        ref = self.refs.get(name)
        if ref is None:
            raise ForeignFileError(f"{self.file.name} lacks the tensor {self.prefix + name!r}")
        if len(ref.shape) != dims:
            raise ForeignFileError(
                f"{self.file.name}: {self.prefix + name!r} has the shape {ref.shape}, not {dims} sizes"
            )
        return ref.shape

    def num_blocks(self) -> int:
        """In a group."""
        blocks = {name.split(".")[2] for name in self.refs if name.startswith("blocks.group_1.block_")}
        if len(blocks) > MAX_BLOCKS:
            raise ForeignFileError(f"{self.file.name} has {len(blocks):,} blocks in a group: refused")
        return max(1, len(blocks))

    def check(self) -> _Half:
        self.file.check({self.prefix + name: ref for name, ref in self.refs.items()})
        return self


def read_pretrained(files: Sequence[ForeignFile]) -> Pretrained:
    """Of one file, or of an encoder's and a decoder's. Raises ForeignFileError naming file and first mismatch."""
    for file in files:
        if _is_dalle_pytorch(file.value):
            if len(files) > 1:
                raise ForeignFileError(f"{file.name} is a whole model of DALLE-pytorch: import it by itself")
            if not _holds_openai(file):
                return _dalle_pytorch(file)
    halves = [half.check() for file in files for half in _halves(file)]
    return _openai(_pair(halves))


def _halves(file: ForeignFile) -> Iterator[_Half]:
    """The encoder and the decoder that a file holds."""
    value = file.value
    if isinstance(value, Instance):
        if value.of not in MODULE_SIDES:
            raise ForeignFileError(f"{file.name} is a {value.of.replace(' ', '.')}, not a whole encoder or decoder")
        yield _Half(MODULE_SIDES[value.of], file, "", state_dict(value, file.name), value)
        return
    if _is_dalle_pytorch(value):
        under = _under_vae(file)
        if not _is_state(under):
            raise ForeignFileError(f"{file.name}: something among its weights is no tensor")
        yield from _split(file, under, "vae.")
        return
    for wrapper in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
            value = value[wrapper]
    if not isinstance(value, dict) or not _is_state(value):
        raise ForeignFileError(f"{file.name} is neither a state dict nor a model that is known here; {WHAT_IS_READ}")
    yield from _split(file, value, "")


def _split(file: ForeignFile, refs: Mapping[str, TensorRef], before: str) -> Iterator[_Half]:
    """A state dict into what stands under each prefix. `before`: all of them, in the file's own names."""
    found = [prefix for prefix in PREFIXES if prefix + FIRST in refs]
    if not found:
        raise ForeignFileError(f"{file.name} has no tensor {before + FIRST!r}: it is none of OpenAI's; {WHAT_IS_READ}")
    for name in refs:
        if not any(name.startswith(f"{prefix}blocks.") for prefix in found):
            raise ForeignFileError(f"{file.name} has the tensor {before + name!r}, which no encoder or decoder has")
    for prefix in found:
        inside = {name.removeprefix(prefix): ref for name, ref in refs.items() if name.startswith(f"{prefix}blocks.")}
        half = _Half("encoder", file, before + prefix, inside)
        # An encoder begins with a convolution of 7×7 pixels, a decoder with one of 1×1 tokens.
        yield half if half.shape(FIRST, 4)[2] > 1 else _Half("decoder", file, before + prefix, inside)


def _pair(halves: Sequence[_Half]) -> tuple[_Half, _Half | None]:
    """(encoder, decoder)"""
    sides: dict[Side, _Half] = {}
    for half in halves:
        if half.side in sides:
            first, second = sides[half.side].file.name, half.file.name
            raise ForeignFileError(f"{first} and {second} are both {half.side}s: give one encoder, and one decoder")
        sides[half.side] = half
    if "encoder" not in sides:
        raise ForeignFileError(f"{halves[0].file.name} is a decoder, which makes no tokens: give the encoder too")
    return sides["encoder"], sides.get("decoder")


def _openai(pair: tuple[_Half, _Half | None]) -> Pretrained:
    encoder, decoder = pair
    config = _config(encoder, decoder)
    with torch.device("meta"):
        expected = DVAE(config).state_dict()
    weights: dict[str, Tensor] = {}
    stored_as: set[str] = set()
    for half in filter(None, pair):
        _check(half, {name: tuple(each.shape) for name, each in expected.items()}, config)
        tensors = half.file.tensors(half.refs)
        weights |= {f"{half.side}.{name}": tensors[name] for name in tensors}
        stored_as |= {ref.storage.dtype for ref in half.refs.values()}
    return Pretrained("openai", config, weights, None, decoder is not None, tuple(sorted(stored_as)))


def _config(encoder: _Half, decoder: _Half | None) -> DVAEConfig:
    """What the tensors' own shapes say. Raises ForeignFileError where encoder and decoder are not of one model."""
    codebook_size, width = encoder.shape(LAST, 4)[0], encoder.shape(FIRST, 4)[0]
    decoder_init = DVAEConfig.decoder_init
    if decoder is not None:
        decoder_init, found = decoder.shape(FIRST, 4)[:2]
        if found != codebook_size:
            raise ForeignFileError(
                f"{encoder.file.name} has {codebook_size:,} codes and {decoder.file.name} {found:,}: "
                "they are not of one model"
            )
    try:
        return DVAEConfig(
            codebook_size=codebook_size,
            width=width,
            blocks_per_group=encoder.num_blocks(),
            decoder_init=decoder_init,
            downsample=8,
        )
    except ModelError as error:
        raise ForeignFileError(f"{encoder.file.name}: {error}") from error


def _check(half: _Half, expected: Mapping[str, tuple[int, ...]], config: DVAEConfig) -> None:
    """Names, shapes, and the attributes of pickled modules: the first mismatch is named."""
    wanted = {name.removeprefix(f"{half.side}."): each for name, each in expected.items() if name.startswith(half.side)}
    of = f"{'an' if half.side == 'encoder' else 'a'} {half.side} of width {config.width}"
    for name in [*wanted, *(name for name in half.refs if name not in wanted)]:
        shown = repr(half.prefix + name)
        if name not in half.refs:
            raise ForeignFileError(f"{half.file.name} lacks the tensor {shown}, which {of} has")
        if name not in wanted:
            raise ForeignFileError(f"{half.file.name} has the tensor {shown}, which {of} lacks")
        if half.refs[name].shape != wanted[name]:
            raise ForeignFileError(
                f"{half.file.name}: {shown} has the shape {half.refs[name].shape}; {of} needs {wanted[name]}"
            )
    if half.module is not None:
        with torch.device("meta"):
            ours = getattr(DVAE(config), half.side)
        check_layers(half.module, ours, config.blocks_per_group, half.file.name)


def _is_state(value: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(each, TensorRef) for name, each in value.items())


def _is_dalle_pytorch(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("weights"), dict) and "hparams" in value


def _is_whole_dalle(value: dict[str, Any]) -> bool:
    """dalle.pt, and not vae.pt."""
    return "vae_params" in value or any(str(name).startswith("vae.") for name in value["weights"])


def _holds_openai(file: ForeignFile) -> bool:
    """DALLE-pytorch can be trained on OpenAI's dVAE, whose weights are then in its dalle.pt."""
    return _is_whole_dalle(file.value) and f"vae.enc.{FIRST}" in file.value["weights"]


def _under_vae(file: ForeignFile) -> dict[str, TensorRef]:
    """Those tensors of a dalle.pt that are the image tokenizer's, without their `vae.`"""
    named = ((name, ref) for name, ref in file.value["weights"].items() if isinstance(name, str))
    return {name.removeprefix("vae."): ref for name, ref in named if name.startswith("vae.")}


def _dalle_pytorch(file: ForeignFile) -> Pretrained:
    """Of a vae.pt, or of the DiscreteVAE in a dalle.pt."""
    value, whole = file.value, _is_whole_dalle(file.value)
    refs = _under_vae(file) if whole else value["weights"]
    hparams = value.get("vae_params") if whole else value["hparams"]
    if whole and not isinstance(hparams, dict):
        named = value.get("vae_class_name")
        of = f" but a {named}" if isinstance(named, str) else ""
        raise ForeignFileError(f"{file.name}: the image tokenizer in it is no DiscreteVAE{of}, which is not read here")
    if not _is_state(refs):
        raise ForeignFileError(f"{file.name}: something among its weights is no tensor")
    _check_hparams(file, hparams)
    try:
        config, weights, image_size = from_hparams(hparams, file.tensors(refs))
    except ForeignFileError:
        raise
    except (ModelError, TypeError, ValueError) as error:
        raise ForeignFileError(f"{file.name}: {error}") from error
    stored_as = tuple(sorted({ref.storage.dtype for ref in refs.values()}))
    return Pretrained("dalle_pytorch", config, weights, image_size, True, stored_as)


def _check_hparams(file: ForeignFile, hparams: Any) -> None:
    """Their architecture is built before it is compared: its numbers must be of a size that the file could hold."""
    if not isinstance(hparams, dict) or not all(isinstance(name, str) for name in hparams):
        raise ForeignFileError(f"{file.name}: its hparams are no dict of names")
    for name, value in hparams.items():
        if isinstance(value, int) and not 0 <= value <= MAX_HPARAM:
            raise ForeignFileError(f"{file.name}: its hparams say {name} {value}, which its weights cannot be of")
        if not _is_plain(value) and not (name == "normalization" and _is_normalization(value)):
            raise ForeignFileError(
                f"{file.name}: its hparams hold a {type(value).__name__} as {name}, which no DiscreteVAE is made of"
            )


def _is_plain(value: Any) -> bool:
    """What may be repeated in a message."""
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and len(value) <= MAX_TEXT)


def _is_normalization(value: Any) -> bool:
    """Means and standard deviations of up to four channels."""
    halves = value if isinstance(value, list | tuple) and len(value) == 2 else ()
    return bool(halves) and all(
        isinstance(half, list | tuple) and len(half) <= 4 and all(isinstance(each, int | float) for each in half)
        for half in halves
    )
