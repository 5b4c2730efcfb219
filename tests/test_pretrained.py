"""OpenAI's weights are recognised in whatever form they come, and give the logits and tokens of OpenAI's own code."""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from foreign_files import CODES, WIDTH, decoder, encoder, saved
from model import losses, quantizer
from model.checkpoint import checkpoint_files, read_checkpoint, tokenizer_id
from model.config import DVAEConfig, ModelError
from model.dvae import DVAE
from model.foreign_file import ForeignFile, read_foreign
from model.foreign_names import ForeignFileError
from model.pretrained import Pretrained, read_pretrained
from model.tokenizer import DVAETokenizer

PEERS = os.environ.get("DVAE_TEST_PEERS")
HOW_TO_GET_IT = (
    "set DVAE_TEST_PEERS to a folder made by pip install --no-deps --target FOLDER dall-e==0.1 attrs requests"
)
SPEC = {"size": 32, "resample": "lanczos", "small": "refuse", "version": 1}
ENCODER, DECODER = encoder(), decoder()
PICKLED, PICKLED_DECODER = saved(ENCODER), saved(DECODER)


def opened(data: bytes, name: str = "x.pt") -> ForeignFile:
    return read_foreign(io.BytesIO(data), name)


def from_state(*states: dict[str, Any]) -> Pretrained:
    return read_pretrained([opened(saved(state), f"{n}.pt") for n, state in enumerate(states)])


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: each for name, each in module.state_dict().items()}


def pictures(size: int, count: int = 6) -> np.ndarray:
    """Smooth ones, noise, black and white."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.uniform(0, 255, (count, 3, 4, 4)))
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255).permute(0, 2, 3, 1).numpy()
    made = smooth.astype(np.uint8)
    made[0], made[1], made[2] = 0, 255, random.integers(0, 256, made[2].shape)
    return made


def ours(found: Pretrained) -> DVAE:
    model = DVAE(found.config)
    model.load_state_dict(found.weights)
    return model.requires_grad_(False)


def tokenizer(found: Pretrained, size: int) -> DVAETokenizer:
    files = checkpoint_files(
        weights=found.weights, dvae_config=found.config, image_spec=SPEC | {"size": size}, step=0, training_state=None,
        extra={}, has_decoder=found.has_decoder,
    )  # fmt: skip
    return DVAETokenizer(read_checkpoint(files.__getitem__), batch_size=4)


def id_of(found: Pretrained) -> str:
    return tokenizer_id(found.weights, found.config, SPEC)


def assert_equal(found: Pretrained, theirs: tuple[nn.Module, nn.Module], size: int, count: int = 6) -> None:
    """Logits, tokens and pixel statistics in fp32 on this CPU: those of their code, from their mapping of pixels on."""
    pixels_BHWC = pictures(size, count)
    x_BCHW = 0.8 * (torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 255) + 0.1
    with torch.no_grad():
        logits_BKHW = theirs[0](x_BCHW)
        tokens_BHW = logits_BKHW.argmax(dim=1)
        one_hot_BKHW = nn.functional.one_hot(tokens_BHW, logits_BKHW.shape[1]).permute(0, 3, 1, 2).float()
        stats_BCHW = theirs[1](one_hot_BKHW)
    model = ours(found)
    z_NC = model.encode(losses.map_pixels(torch.from_numpy(pixels_BHWC)))
    logits_NK = quantizer.logits(z_NC, model.tables())
    assert_close(logits_NK, logits_BKHW.permute(0, 2, 3, 1).flatten(0, 2))
    assert np.array_equal(tokenizer(found, size).encode(pixels_BHWC), tokens_BHW.numpy())
    grid_BHW = (tokens_BHW.shape[0], tokens_BHW.shape[1], tokens_BHW.shape[2])
    assert_close(model.decode_tokens(tokens_BHW.flatten(), grid_BHW), stats_BCHW)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """To 1e-5 of the largest."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


# Exactness


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_logits_tokens_and_pictures_are_those_of_the_pickled_modules(num_blocks: int, one_thread: None) -> None:
    theirs = encoder(num_blocks=num_blocks), decoder(num_blocks=num_blocks)
    found = read_pretrained([opened(saved(each)) for each in theirs])
    assert found.config == DVAEConfig(
        codebook_size=CODES, width=WIDTH, blocks_per_group=num_blocks, decoder_init=8, downsample=8
    )
    assert_equal(found, theirs, size=64)


@pytest.fixture
def dall_e() -> Iterator[Any]:
    """PyPI's own package."""
    if not PEERS or not (Path(PEERS) / "dall_e").is_dir():
        pytest.skip(f"set DVAE_TEST_PEERS to a FOLDER of: {HOW_TO_GET_IT}")
    sys.path.insert(0, PEERS)
    yield importlib.import_module("dall_e")
    sys.path.remove(PEERS)
    for name in _modules_of_dall_e():
        del sys.modules[name]


def _modules_of_dall_e() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "dall_e"]


def imported_from(theirs: tuple[nn.Module, nn.Module], *, first_format: bool) -> Pretrained:
    """Pickled whole, and read where no `dall_e` can be imported."""
    buffers = [io.BytesIO(), io.BytesIO()]
    for module, buffer in zip(theirs, buffers, strict=True):
        torch.save(module, buffer, _use_new_zipfile_serialization=not first_format)
    with pytest.MonkeyPatch.context() as patch:
        for name in _modules_of_dall_e():
            patch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError):
            importlib.import_module("dall_e.encoder")
        return read_pretrained([opened(buffer.getvalue()) for buffer in buffers])


@pytest.mark.parametrize("first_format", [False, True])
def test_files_of_the_real_classes_are_imported_exactly(dall_e: Any, first_format: bool, one_thread: None) -> None:
    torch.manual_seed(0)
    theirs = dall_e.Encoder(n_hid=64, vocab_size=512), dall_e.Decoder(n_hid=64, vocab_size=512)
    assert_equal(imported_from(theirs, first_format=first_format), theirs, size=64)


@pytest.mark.slow
def test_files_of_the_published_size_are_imported_exactly(dall_e: Any) -> None:
    torch.manual_seed(0)
    theirs = dall_e.Encoder(), dall_e.Decoder()
    found = imported_from(theirs, first_format=False)
    sides = [[each for name, each in found.weights.items() if name.startswith(side)] for side in ("encoder", "decoder")]
    assert [len(side) for side in sides] == [74, 76]
    assert [sum(each.numel() for each in side) for side in sides] == [53_786_240, 43_829_766]
    assert found.config == DVAEConfig()
    assert_equal(found, theirs, size=256, count=3)


# Every form gives the same model


def test_every_form_of_the_same_weights_gives_the_same_tokenizer_id() -> None:
    states = ENCODER.state_dict(), DECODER.state_dict()
    both = prefixed("encoder.", ENCODER) | prefixed("decoder.", DECODER)
    dalle = prefixed("vae.enc.", ENCODER) | prefixed("vae.dec.", DECODER) | {"text_emb.weight": torch.ones(3, 3)}
    forms = {
        "pickles": read_pretrained([opened(PICKLED), opened(PICKLED_DECODER)]),
        "the other way round": read_pretrained([opened(PICKLED_DECODER), opened(PICKLED)]),
        "an encoder alone": read_pretrained([opened(PICKLED)]),
        "state dicts": from_state(*states),
        "one state dict": from_state(both),
        "a state dict within": from_state({"state_dict": both, "epoch": 3}),
        "enc and dec": from_state(prefixed("enc.", ENCODER) | prefixed("dec.", DECODER)),
        "safetensors": read_pretrained([opened(save_safetensors(both))]),
        "dalle.pt trained on it": from_state({"hparams": {"dim": 8}, "vae_params": None, "weights": dalle}),
    }
    ids = {name: id_of(found) for name, found in forms.items()}
    assert len(set(ids.values())) == 1, ids
    assert {name for name, found in forms.items() if not found.has_decoder} == {"an encoder alone"}


def test_the_tokenizer_id_of_these_weights_is_this_one_on_every_machine() -> None:
    state = {
        name: (torch.arange(each.numel()) / 4096).reshape(each.shape) for name, each in ENCODER.state_dict().items()
    }
    assert id_of(from_state(state)) == "e287eb70b6076374cd75549993b6347c"


def test_half_precision_weights_are_kept_exactly_and_said() -> None:
    found = from_state({name: each.half() for name, each in ENCODER.state_dict().items()})
    assert found.stored_as == ("float16",)
    assert all(torch.equal(found.weights[f"encoder.{n}"], e.half().float()) for n, e in ENCODER.state_dict().items())


# An encoder alone


def test_an_encoder_alone_makes_the_same_tokens_and_says_that_pictures_need_the_decoder() -> None:
    files = [opened(PICKLED), opened(PICKLED_DECODER)]
    alone, whole = (tokenizer(read_pretrained(each), 32) for each in (files[:1], files))
    pixels_BHWC = pictures(32)
    tokens_BHW = alone.encode(pixels_BHWC)
    assert np.array_equal(tokens_BHW, whole.encode(pixels_BHWC))
    assert whole.decode(tokens_BHW).shape == pixels_BHWC.shape
    with pytest.raises(ModelError, match=r"an encoder alone.*need the decoder too.*import encoder\.pkl"):
        alone.decode(tokens_BHW)
    assert (alone.margins(pixels_BHWC, tokens_BHW) == 0).all()


# What does not fit, by name


def changed(state: dict[str, Any], **changes: Tensor | None) -> dict[str, Any]:
    """With other tensors under some names (`__` for a dot), or without them."""
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (dict(state) | names).items() if value is not None}


def attacked(**attributes: Any) -> nn.Module:
    """An encoder whose tensors are right, and one of whose layers is another."""
    module = encoder()
    block, pool = module.blocks.group_2.block_1, module.blocks.group_2.pool
    for name, value in attributes.items():
        setattr(block if name == "post_gain" else pool, name, value)
    return module


def rebuilt(change: Callable[[Any], None]) -> nn.Module:
    """An encoder with the tensors of OpenAI's, and other layers between them."""
    module = encoder()
    change(module.blocks)
    return module


def no_pooling(blocks: Any) -> None:
    blocks.group_1.pool = nn.Identity()


def backwards(blocks: Any) -> None:
    blocks.group_1._modules = dict(reversed(blocks.group_1._modules.items()))


def without_gain(blocks: Any) -> None:
    del blocks.group_1.block_1.post_gain


def one_more(blocks: Any) -> None:
    blocks.output.extra = nn.ReLU()


def one_less(blocks: Any) -> None:
    blocks.group_3.block_1.res_path.relu_2 = nn.Identity()


def padded_otherwise(blocks: Any) -> None:
    blocks.input.__dict__["kw"] = 5


def shadowed_weights(blocks: Any) -> None:
    """Torch computes with the attribute, not with the parameter of that name."""
    blocks.output.conv.__dict__["w"] = torch.zeros_like(blocks.output.conv.w)


def shadowed_layer(blocks: Any) -> None:
    blocks.group_1.block_1.__dict__["id_path"] = nn.ReLU()


def with_a_hook(blocks: Any) -> None:
    blocks.group_1._forward_hooks[0] = nn.ReLU()


E_STATE, D_STATE = ENCODER.state_dict(), DECODER.state_dict()
CONV_1 = "blocks.group_1.block_1.res_path.conv_1.w"
MISFITS: dict[str, tuple[list[Any], str]] = {  # what is in the files, and what is said of it
    "a tensor is missing": (
        [changed(E_STATE, blocks__group_2__block_1__id_path__w=None)],
        "0.pt lacks the tensor 'blocks.group_2.block_1.id_path.w', which an encoder of width 8 has"),
    "the first tensor is missing": ([changed(E_STATE, blocks__input__w=None)], "has no tensor 'blocks.input.w'"),
    "the last tensor is missing": (
        [changed(E_STATE, blocks__output__conv__w=None)], "0.pt lacks the tensor 'blocks.output.conv.w'"),
    "a tensor too many": (
        [changed(E_STATE, blocks__group_5__w=torch.ones(1))],
        "0.pt has the tensor 'blocks.group_5.w', which an encoder of width 8 lacks"),
    "a tensor of something else": (
        [changed(E_STATE, head__w=torch.ones(1))], "0.pt has the tensor 'head.w', which no encoder or decoder has"),
    "a tensor of another shape": (
        [dict(E_STATE) | {CONV_1: torch.ones(2, 8, 5, 5)}],
        f"0.pt: '{CONV_1}' has the shape (2, 8, 5, 5); an encoder of width 8 needs (2, 8, 3, 3)"),
    "no convolution": (
        [changed(E_STATE, blocks__input__w=torch.ones(8))], "'blocks.input.w' has the shape (8,), not 4 sizes"),
    "a width that no block can have": (
        [changed(E_STATE, blocks__input__w=torch.ones(6, 3, 7, 7))], "0.pt: width 6 is not a multiple of 4"),
    "whole numbers": (
        [changed(E_STATE, blocks__input__b=torch.ones(8, dtype=torch.int64))], "0.pt: 'blocks.input.b' is int64"),
    "a decoder alone": ([D_STATE], "0.pt is a decoder, which makes no tokens: give the encoder too"),
    "two encoders": ([E_STATE, E_STATE], "0.pt and 1.pt are both encoders: give one encoder, and one decoder"),
    "halves of two models": (
        [E_STATE, decoder(vocab_size=16).state_dict()], "0.pt has 32 codes and 1.pt 16: they are not of one model"),
    "halves of two widths": ([E_STATE, decoder(n_hid=16).state_dict()], "; a decoder of width 8 needs (64, 8, 1, 1)"),
    "no pooling": (
        [rebuilt(no_pooling)],
        "0.pt has blocks.group_1.pool, a Identity where dvae's layers, in their order, have blocks.group_1.pool, a M"),
    "another order": ([rebuilt(backwards)], "0.pt has blocks.group_1.pool, a MaxPool2d where dvae's layers"),
    "no gain": ([rebuilt(without_gain)], "0.pt: blocks.group_1.block_1.post_gain is 'NoneType'; dvae's layers have 0"),
    "a layer too many": ([rebuilt(one_more)], "0.pt has blocks.output.extra, a ReLU where dvae's layers"),
    "no activation": ([rebuilt(one_less)], "0.pt has blocks.group_3.block_1.res_path.relu_2, a Identity where"),
    "another padding": ([rebuilt(padded_otherwise)], "0.pt: blocks.input.kw is 5; dvae's layers have 7 there"),
    "weights that others lie over": ([rebuilt(shadowed_weights)], "0.pt: blocks.output.conv.w is set on the object"),
    "a layer that another lies over": ([rebuilt(shadowed_layer)], "block_1.id_path is set on the object itself"),
    "a hook": ([rebuilt(with_a_hook)], "0.pt: blocks.group_1._forward_hooks is set on the object itself, so it comput"),
    "another gain": (
        [attacked(post_gain=0.5)], "0.pt: blocks.group_2.block_1.post_gain is 0.5; dvae's layers have 0.015625 there"),
    "another pooling": ([attacked(kernel_size=3)], "blocks.group_2.pool.kernel_size is 3; dvae's layers have 2 there"),
    "a layer alone": ([ENCODER.blocks], "is a torch.nn.modules.container.Sequential, not a whole encoder or decoder"),
    "something else": ([[1, 2]], "is neither a state dict nor a model that is known here; dvae import reads OpenAI's"),
    "a state dict of something else": ([{"fc.weight": torch.ones(2)}], "has no tensor 'blocks.input.w': it is none of"),
    "a state dict of no names": ([{1: torch.ones(2)}], "is neither a state dict nor a model that is known here"),
    "a thousand blocks": (
        [dict(E_STATE) | {f"blocks.group_1.block_{n}.w": torch.ones(1) for n in range(1000)}],
        "0.pt has 1,000 blocks in a group: refused"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_the_first_misfit_is_named(case: str) -> None:
    values, words = MISFITS[case]
    with pytest.raises(ForeignFileError, match=re.escape(words)):
        from_state(*values)
