"""encode from several threads: the same tokens, torch's settings as they were, nothing kept of what was given."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import tokenizer as tokenizer_module
from model.checkpoint import Checkpoint, tokenizer_id
from model.config import DVAEConfig
from model.dvae import seeded_dvae
from model.lanes import CudaLane, Lane, Lanes, exact
from model.tokenizer import DVAETokenizer

CONFIG = DVAEConfig(codebook_size=64, width=8, blocks_per_group=1, decoder_init=8, stem="strided")
SPEC = {"size": 32, "version": 1}


def _tokenizer(**options: object) -> DVAETokenizer:
    weights = dict(seeded_dvae(CONFIG, 0).state_dict())
    checkpoint = Checkpoint(weights, CONFIG, SPEC, 0, tokenizer_id(weights, CONFIG, SPEC))
    return DVAETokenizer(checkpoint, device="cpu", **{"batch_size": 4, **options})


def _pixels(num_images: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_images, 32, 32, 3), dtype=np.uint8)


def test_threads_that_encode_at_once_get_the_tokens_they_would_get_alone():
    tokenizer, pixels_BHWC = _tokenizer(), _pixels(40)
    alone = tokenizer.encode(pixels_BHWC)
    with ThreadPoolExecutor(8) as executor:
        starts = list(range(0, 40, 5)) * 5
        found = list(executor.map(lambda start: tokenizer.encode(pixels_BHWC[start : start + 5]), starts))
    assert all(np.array_equal(one, alone[start : start + 5]) for start, one in zip(starts, found, strict=True))


def test_tokenizers_with_other_settings_do_not_disturb_each_other_nor_the_process():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    seen: list[tuple[int, str]] = []

    def note(threads: int) -> None:
        for _ in range(50):
            with exact(threads):
                seen.append((torch.get_num_threads() - threads, torch.get_float32_matmul_precision()))

    try:
        with ThreadPoolExecutor(3) as executor:
            list(executor.map(note, (1, 2, 3)))
            assert executor.submit(torch.get_float32_matmul_precision).result() == "high"
        assert set(seen) == {(0, "highest")} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision("highest")


def test_an_error_inside_gives_the_settings_and_the_lane_back():
    tokenizer, before = _tokenizer(), torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), exact(before + 1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    lanes = Lanes((1, 1, 1, 3), (1, 1, 1), torch.device("cpu"))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), lanes.lane() as lane:
            lane.launch(lambda pixels: pixels.sum() / (1 // 0))
    assert tokenizer.encode(_pixels(1)).shape == (1, 4, 4)


def test_read_only_and_strided_pixels_are_taken_without_a_warning():
    tokenizer, pixels_BHWC = _tokenizer(), _pixels(6)
    expected = tokenizer.encode(pixels_BHWC)
    pixels_BHWC.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(tokenizer.encode(pixels_BHWC), expected)
        assert np.array_equal(tokenizer.encode(pixels_BHWC[::2]), expected[::2])


def test_nothing_is_kept_of_the_pixels_and_tokens_given_out_stay_as_they_are():
    tokenizer, pixels_BHWC = _tokenizer(), _pixels(4)
    first = tokenizer.encode(pixels_BHWC)
    kept = first.copy()
    pixels_BHWC[:] = 255
    tokenizer.encode(pixels_BHWC)
    assert np.array_equal(first, kept)


def test_a_lane_fills_its_batch_up_with_black_whatever_was_in_it_before():
    lane = Lane((3, 2, 2, 3), (3, 1, 1))
    lane.fill(np.full((3, 2, 2, 3), 9, np.uint8))
    lane.fill(np.full((1, 2, 2, 3), 7, np.uint8))
    lane.launch(lambda pixels_bHWC: pixels_bHWC.amax(dim=(1, 2, 3)).int().view(3, 1, 1))
    assert lane.tokens().reshape(-1).tolist() == [7, 0, 0]


def test_who_finds_all_lanes_taken_waits_for_one():
    lanes, entered = Lanes((1, 1, 1, 3), (1, 1, 1), torch.device("cpu")), threading.Event()

    def enter() -> None:
        with lanes.lane():
            entered.set()

    with ThreadPoolExecutor(1) as executor:
        with lanes.lane():
            executor.submit(enter)
            assert not entered.wait(0.05)
        assert entered.wait(60)


class _Recorded:
    """torch.cuda's streams and events on the CPU: nothing runs later, but the order is written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.names = (f"stream {n}" for n in range(9))
        recorded, zeros = self, torch.zeros

        class Stream:
            def __init__(self, device: object = None) -> None:
                self.name = next(recorded.names)

            def wait_stream(self, other: Stream) -> None:
                recorded.log.append(f"{self.name} waits for {other.name}")

        class Event:
            def __init__(self, blocking: bool) -> None:
                assert blocking

            def record(self) -> None:
                recorded.log.append("record")

            def synchronize(self) -> None:
                assert torch.get_float32_matmul_precision() == "high", "waiting holds nobody's settings"
                recorded.log.append("synchronize")

        @contextmanager
        def stream(one: Stream) -> Iterator[None]:
            recorded.log.append(f"on {one.name}")
            yield

        fake = SimpleNamespace(Stream=Stream, Event=Event, stream=stream, current_stream=lambda device: default)
        default = Stream()
        monkeypatch.setattr(torch, "cuda", fake)
        monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, device=None, **k: zeros(*a, **k))


def test_on_cuda_the_copy_has_a_stream_of_its_own_and_all_lanes_compute_on_one(monkeypatch):
    recorded = _Recorded(monkeypatch)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    device = torch.device("cpu")
    compute = torch.cuda.Stream(device)
    lanes = [CudaLane((2, 2, 2, 3), (2, 1, 1), device, compute) for _ in range(2)]
    recorded.log.clear()
    for value, lane in enumerate(lanes, start=7):
        lane.fill(np.full((1, 2, 2, 3), value, np.uint8))
        lane.launch(lambda pixels_bHWC: pixels_bHWC.amax(dim=(1, 2, 3)).int().view(2, 1, 1))
    launched = [(f"on stream {n}", f"stream 1 waits for stream {n}", "on stream 1", "record") for n in (2, 3)]
    assert recorded.log == [*launched[0], *launched[1]]
    assert [lane.tokens().reshape(-1).tolist() for lane in lanes] == [[7, 0], [8, 0]]
    assert recorded.log[-2:] == ["synchronize"] * 2


def test_on_cuda_what_shares_the_lanes_buffers_computes_on_their_stream(monkeypatch):
    recorded = _Recorded(monkeypatch)
    lanes = Lanes((2, 2, 2, 3), (2, 1, 1), SimpleNamespace(type="cuda"))
    assert recorded.log[0] == "stream 1 waits for stream 0"
    with lanes.in_turn():
        assert recorded.log[-1] == "on stream 1"


def test_margins_share_the_lanes_buffers_in_turn(monkeypatch):
    tokenizer, entered = _tokenizer(), list[bool]()
    monkeypatch.setattr(tokenizer._lanes, "in_turn", lambda: nullcontext(entered.append(True)))
    tokens_BHW = tokenizer.encode(_pixels(3))
    assert not entered
    assert not tokenizer.margins(_pixels(3), tokens_BHW).any() and entered == [True]


def test_the_lanes_are_made_after_the_buffers_that_their_stream_waits_for(monkeypatch):
    made: list[str] = []
    for name in ("Latents", "CodeSearch", "Lanes"):
        real = getattr(tokenizer_module, name)
        monkeypatch.setattr(
            tokenizer_module, name, lambda *a, name=name, real=real, **k: made.append(name) or real(*a, **k)
        )
    _tokenizer()
    assert made == ["Latents", "CodeSearch", "Lanes"]
