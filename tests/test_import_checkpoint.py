"""`dvae import`: what is written, what is recorded of its sources, what is refused; and the tokens that come of it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch
from safetensors.torch import load_file

from foreign_files import CODES, Calls, archive, decoder, encoder, pickled, saved
from jobs.api import load_tokenizer
from jobs.checkpoints import CheckpointNotFound, TokenizerSource, read_head
from jobs.config import check
from jobs.eval_checkpoint import EvalSettings, evaluate
from jobs.foreign_source import SourceChanged, SourceNotFound, open_source
from jobs.import_checkpoint import CannotImport, import_sources, run_import
from jobs.show import load_matching_tokenizer
from jobs.tokenize_config import TokenizeConfig
from jobs.tokenize_dataset import run_tokenize
from make_data import folder_bytes, image_bytes, sample_members, tar_bytes, write_checkpoint
from model.checkpoint import tokenizer_id
from model.config import ModelError, model_config
from model.foreign_names import ForeignFileError
from pipeline.images import ImageSpec, decode_image

SIZE = 256  # OpenAI's


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of encoder.pkl and decoder.pkl, pickled as OpenAI's."""
    folder = tmp_path_factory.mktemp("openai")
    (folder / "encoder.pkl").write_bytes(saved(encoder()))
    (folder / "decoder.pkl").write_bytes(saved(decoder()))
    return folder


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "imported"


def imported(*places: object, licence: str | None = None) -> None:
    """All but the last are sources."""
    *given, last = map(str, places)
    assert run_import(given, last, licence=licence, as_json=False) == 0


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoint.json").read_text())


def card_of(folder: Path) -> str:
    return (folder / "MODEL_CARD.md").read_text()


# What is written


def test_the_record_says_what_it_was_made_of(sources: Path, dest: Path) -> None:
    imported(sources / "encoder.pkl", sources / "decoder.pkl", dest)
    source = record_of(dest)["extra"]["source"]
    files = {name: (sources / name).read_bytes() for name in ("encoder.pkl", "decoder.pkl")}
    assert source["kind"] == "openai" and source["stored_as"] == ["float32"]
    assert source["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
    }
    assert record_of(dest)["image_spec"] == {"size": SIZE, "resample": "lanczos", "small": "refuse", "version": 1}
    assert str(sources) not in json.dumps(record_of(dest)), "a path of this machine says nothing elsewhere"


def test_what_is_written_does_not_depend_on_place_time_or_order(sources: Path, tmp_path: Path) -> None:
    imported(sources, tmp_path / "one")
    imported(sources / "encoder.pkl", sources / "decoder.pkl", tmp_path / "two")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    imported(sources / "decoder.pkl", sources / "encoder.pkl", tmp_path / "three")
    assert record_of(tmp_path / "one")["tokenizer_id"] == record_of(tmp_path / "three")["tokenizer_id"]
    imported(sources, tmp_path / "one")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_the_card_has_the_licence_the_limits_and_the_source(sources: Path, dest: Path) -> None:
    imported(sources, dest)
    card = card_of(dest)
    for words in (
        "indicate clearly that the DALL·E", "Software Copyright (c) 2021 OpenAI", "at most", "## Limits",
        "not for image processing that must keep fine detail", "EXIF orientation is applied", "near-ties",
        hashlib.sha256((sources / "encoder.pkl").read_bytes()).hexdigest(), "`encoder.pkl`, ", "YFCC100M",
    ):  # fmt: skip
        assert words in card
    assert "An encoder alone" not in card


def test_a_licence_that_is_given_is_the_one_in_the_card(sources: Path, dest: Path) -> None:
    imported(sources, dest, licence="cc-by-4.0, by a colleague")
    assert "cc-by-4.0, by a colleague" in card_of(dest) and "OpenAI published its weights" not in card_of(dest)
    assert record_of(dest)["extra"]["source"]["license"] == "cc-by-4.0, by a colleague"
    imported(sources, dest)  # the same weights: what is said of them may change
    assert "license" not in record_of(dest)["extra"]["source"]


def test_another_image_size_is_another_tokenizer(sources: Path, tmp_path: Path) -> None:
    def imported_at(size: int | None, *places: object) -> dict[str, Any]:
        *given, last = map(str, places)
        assert run_import(given, last, licence=None, as_json=False, image_size=size) == 0
        return record_of(Path(last))

    usual, beit = imported_at(None, sources, tmp_path / "usual"), imported_at(112, sources, tmp_path / "beit")
    assert beit["image_spec"] == usual["image_spec"] | {"size": 112} and beit["files"] == usual["files"]
    assert load_tokenizer(str(tmp_path / "beit")).grid == (14, 14)
    again = imported_at(112, tmp_path / "usual", tmp_path / "from ours")
    assert again["tokenizer_id"] == beit["tokenizer_id"] != usual["tokenizer_id"]
    with pytest.raises(CannotImport, match=r"images of 100 pixels cannot be tokenised: .*not a multiple"):
        imported_at(100, sources, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("tail", [b"", b"more"])
def test_a_source_that_is_written_to_while_it_is_read_is_refused(tmp_path: Path, tail: bytes) -> None:
    place = tmp_path / "encoder.pkl"
    place.write_bytes(b"weights")
    os.utime(place, ns=(0, 0))
    with pytest.raises(SourceChanged, match=r"encoder\.pkl was written to while it was read"), open_source(str(place)):
        place.write_bytes(b"weights" + tail)


def test_a_remote_source_is_copied_and_gives_the_same_files(sources: Path, tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("encoder.pkl", "decoder.pkl"):
        store.pipe(f"/import-test/{name}", (sources / name).read_bytes())
    imported("memory://import-test/encoder.pkl", "memory://import-test/decoder.pkl", tmp_path / "remote")
    imported(sources, tmp_path / "local")
    assert folder_bytes(tmp_path / "remote") == folder_bytes(tmp_path / "local")


def test_our_own_checkpoint_keeps_its_tokenizer_id_and_its_past(sources: Path, tmp_path: Path) -> None:
    imported(sources, tmp_path / "first")
    imported(tmp_path / "first", tmp_path / "second")
    first, second = record_of(tmp_path / "first"), record_of(tmp_path / "second")
    assert first["tokenizer_id"] == second["tokenizer_id"]
    assert second["extra"]["source"]["before"] == first["extra"]["source"]
    assert set(second["extra"]["source"]["files"]) == {"checkpoint.json", "model.safetensors"}
    assert card_of(tmp_path / "second") == card_of(tmp_path / "first")
    trained = write_checkpoint(tmp_path / "ours")
    imported(trained, tmp_path / "third")
    assert record_of(tmp_path / "third")["tokenizer_id"] == record_of(trained)["tokenizer_id"]


def older(folder: Path, **changes: Any) -> Path:
    """The checkpoint with other fields in its record, as another version would have written them."""
    record = {name: value for name, value in record_of(folder).items() if name != "record_sha256"} | changes
    weights = load_file(folder / "model.safetensors")
    record["tokenizer_id"] = tokenizer_id(weights, model_config(record["model"]), record["image_spec"])
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    record["record_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(record))
    return folder


def test_an_image_spec_of_another_version_is_refused_by_name(sources: Path, tmp_path: Path, dest: Path) -> None:
    imported(sources, tmp_path / "first")
    old = older(tmp_path / "first", image_spec={"size": 256, "resample": "lanczos"})
    with pytest.raises(CannotImport, match="images of 256 pixels cannot be tokenised: no image spec that this version"):
        imported(old, dest)
    assert not dest.exists()


def test_a_record_may_hold_anything_beside_its_weights(sources: Path, tmp_path: Path, dest: Path) -> None:
    imported(sources, tmp_path / "first")
    imported(older(tmp_path / "first", extra={"source": "a text", "training_config": 5}), dest)
    assert record_of(dest)["extra"]["source"].keys() == {"kind", "files"}


def test_a_file_of_weights_is_no_checkpoint_and_the_remedy_is_said(sources: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"encoder\.pkl is a file, .* `dvae import /.*encoder\.pkl FOLDER`"):
        read_head(str(sources / "encoder.pkl"))


# The command


def test_the_command_says_as_json_what_it_made(sources: Path, dest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_import([str(sources / "encoder.pkl")], str(dest), licence=None, as_json=True) == 0
    said, record = json.loads(capsys.readouterr().out), record_of(dest)
    assert said["tokenizer_id"] == record["tokenizer_id"] and said["checkpoint"] == str(dest)
    assert (said["grid"], said["codebook_size"], said["has_decoder"]) == ([32, 32], CODES, False)
    assert said["sources"] == record["extra"]["source"]["files"]


def test_the_command_refuses_an_attack_with_one_line_and_exit_code_2(tmp_path: Path, dest: Path) -> None:
    (tmp_path / "encoder.pkl").write_bytes(archive(pickled(Calls(os.system, f"touch {tmp_path / 'marker'}"))))
    command = [sys.executable, "-m", "jobs.cli", "import", str(tmp_path / "encoder.pkl"), str(dest)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "dvae: encoder.pkl (archive/data.pkl) names 'posix.system', which is none of the names that weights need: "
        "refused, and nothing in it was run"
    ]
    assert not (tmp_path / "marker").exists() and not dest.exists()


# What is refused, and leaves what is there


def test_what_is_no_source_is_refused_with_what_can_be_read(sources: Path, tmp_path: Path, dest: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceNotFound, match=r"nothing at .*encodr\.pkl; dvae import reads OpenAI's encoder\.pkl"):
        imported(sources / "encodr.pkl", dest)
    with pytest.raises(SourceNotFound, match=r"nothing at .*empty; dvae import reads"):
        imported(tmp_path / "empty", dest)
    (tmp_path / "empty" / "notes.txt").write_text("no checkpoint")
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint at .*looked for checkpoint\.json"):
        imported(tmp_path / "empty", dest)
    with pytest.raises(CannotImport, match="3 sources: give one file, or an encoder's and a decoder's"):
        import_sources(["a", "b", "c"])
    assert not dest.exists()


def test_a_file_of_a_checkpoint_is_not_taken_without_its_image_spec(sources: Path, tmp_path: Path) -> None:
    imported(sources, tmp_path / "first")
    with pytest.raises(CannotImport, match="is part of a checkpoint of dvae: name its folder"):
        imported(tmp_path / "first" / "model.safetensors", tmp_path / "second")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"checkpoint.json": "{}"}, r"holds a checkpoint\.json that cannot be read"),
        ({"model.safetensors": "another's"}, r"holds another model\.safetensors: name another folder"),
        ({"run.json": "{}"}, "holds a run of dvae: name another folder"),
    ],
)
def test_a_folder_of_something_else_is_left_as_it_is(
    there: dict[str, str], words: str, sources: Path, dest: Path
) -> None:
    dest.mkdir()
    for name, text in there.items():
        (dest / name).write_text(text)
    before = folder_bytes(dest)
    with pytest.raises(CannotImport, match=words):
        imported(sources, dest)
    assert folder_bytes(dest) == before


def test_another_model_is_not_written_over(sources: Path, tmp_path: Path, dest: Path) -> None:
    imported(sources, dest)
    before = folder_bytes(dest)
    (tmp_path / "encoder.pkl").write_bytes(saved(encoder(seed=5)))
    with pytest.raises(CannotImport, match=r"holds another checkpoint \(tokenizer \w{32}, step 0\): name another"):
        imported(tmp_path / "encoder.pkl", dest)
    with pytest.raises(CannotImport, match="holds this encoder with a decoder"):
        imported(sources / "encoder.pkl", dest)
    with pytest.raises(CannotImport, match="is both source and destination"):
        imported(dest, dest)
    with pytest.raises(CannotImport, match="is a file: the last name is the folder"):
        imported(sources / "encoder.pkl", sources / "decoder.pkl")
    assert folder_bytes(dest) == before


def test_what_a_kill_left_is_written_over(sources: Path, dest: Path) -> None:
    imported(sources, dest)
    whole = folder_bytes(dest)
    (dest / "checkpoint.json").unlink()
    imported(sources, dest)
    assert folder_bytes(dest) == whole


def test_a_source_that_is_bad_leaves_nothing(sources: Path, tmp_path: Path, dest: Path) -> None:
    (tmp_path / "decoder.pkl").write_bytes((sources / "decoder.pkl").read_bytes()[:-10])
    with pytest.raises(ForeignFileError, match=r"^decoder\.pkl is cut short or damaged"):
        imported(sources / "encoder.pkl", tmp_path / "decoder.pkl", dest)
    assert not dest.exists()


# An encoder alone


def test_an_encoder_alone_says_wherever_pictures_are_asked_for_that_it_needs_a_decoder(
    sources: Path, tmp_path: Path, dest: Path
) -> None:
    imported(sources / "encoder.pkl", dest)
    head, words = (
        read_head(str(dest)),
        "pictures need the decoder too; import both, `dvae import encoder.pkl decoder.pkl",
    )
    assert not head.has_decoder and record_of(dest)["has_decoder"] is False
    assert "**An encoder alone:**" in card_of(dest)
    with pytest.raises(ModelError, match=words):
        load_matching_tokenizer({"tokenizer_id": head.tokenizer_id}, str(dest), "out")
    (tmp_path / "x.tar").write_bytes(tar_bytes(sample_members(0, 1)))
    with pytest.raises(ModelError, match=words):
        evaluate(str(dest), [str(tmp_path / "x.tar")], EvalSettings(num_images=1))
    tokenizer = load_tokenizer(str(dest), batch_size=1)
    tokens_BHW = tokenizer.encode(np.zeros((1, SIZE, SIZE, 3), np.uint8))
    with pytest.raises(ModelError, match=words):
        tokenizer.decode(tokens_BHW)
    imported(sources, dest)  # now with the decoder: the same tokenizer
    whole = load_tokenizer(str(dest), batch_size=1)
    assert whole.tokenizer_id == tokenizer.tokenizer_id
    assert whole.decode(tokens_BHW).shape == (1, SIZE, SIZE, 3)
    assert "**An encoder alone:**" not in card_of(dest)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_imported_encoder_tokenises_through_dvae_tokenize(sources: Path, tmp_path: Path, dest: Path) -> None:
    imported(sources / "encoder.pkl", dest)
    pictures = [image_bytes(n, width=SIZE + 40 * n, height=SIZE + 9) for n in range(3)]
    (tmp_path / "in.tar").write_bytes(tar_bytes([(f"{n}.jpg", data) for n, data in enumerate(pictures)]))
    settings = {
        "checkpoint": str(dest), "shards": str(tmp_path / "in.tar"), "output": str(tmp_path / "out"), "batch_size": 2,
        "ray": {"num_actors": 1},
    }  # fmt: skip
    assert run_tokenize(check(TokenizeConfig, settings, "test"), "dvae") == 0
    rows = ds.dataset(tmp_path / "out" / "tokens").to_table().to_pylist()
    assert len(rows) == 3
    pixels_BHWC = np.stack([decode_image(data, ImageSpec()).pixels_HWC for data in pictures])
    x_BCHW = 0.8 * (torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 255) + 0.1
    with torch.no_grad():
        tokens_BHW = encoder()(x_BCHW).argmax(dim=1).numpy()
    assert np.array_equal(np.array([row["tokens"] for row in rows]).reshape(-1, 32, 32), tokens_BHW)


def test_a_tokenizer_source_loads_an_encoder_alone(sources: Path, dest: Path) -> None:
    imported(sources / "encoder.pkl", dest)
    source = TokenizerSource(str(dest), device="cpu", precision="fp32", batch_size=1, threads=1)
    assert source.load().tokenizer_id == record_of(dest)["tokenizer_id"]
