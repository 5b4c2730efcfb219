"""What caught others, each with the tests that show we do not fall for it. One test holds the index to the truth."""

from __future__ import annotations

import ast
import re
import tarfile
import time
import tomllib
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.config import ConfigError, check
from jobs.tokenize_config import TokenizeConfig
from make_data import FakeTokenizer, fake_table, listed, tar_bytes
from pipeline.output import OutputPrefix
from pipeline.plan import ShardTask
from pipeline.tokenize_shard import TokenizeJob, TokenizeWorker

TESTS = Path(__file__).parent
TRAPS: dict[str, str] = {
    "1 a tar cut at a member boundary, inside a header, inside data, or without its end blocks": """
        test_tar_members.py::test_a_tar_cut_at_any_byte_is_an_error_unless_all_data_and_one_end_block_are_there
        test_tokenize_shard.py::test_a_cut_shard_publishes_nothing
        test_tokenize_dataset.py::test_a_shard_cut_at_a_member_boundary_is_quarantined_and_the_others_are_finished
        test_fuzz.py::test_the_fuzzer_notices_a_reader_that_ends_quietly""",
    "1 zero bytes, and what is not a tar": """
        test_tar_members.py::test_no_bytes_at_all_is_an_error_and_a_tar_without_members_is_none
        test_tar_members.py::test_what_is_not_a_tar_is_said_to_be_none""",
    "1 gzip": """
        test_tar_members.py::test_a_gzipped_tar_cut_at_any_byte_is_an_error
        test_shards.py::test_a_gzipped_shard_gives_the_same_samples_without_offsets""",
    "1 long names in PAX and GNU tars": """
        test_tar_members.py::test_names_sizes_and_offsets_are_those_of_tarfile
        test_tar_members.py::test_a_long_name_whose_size_is_another_is_refused_for_readers_differ_on_it
        test_tar_members.py::test_two_extended_headers_that_name_one_member_are_refused_for_readers_differ_on_them""",
    "1 sparse and directory members": """
        test_tar_members.py::test_sparse_members_are_refused_by_name
        test_tar_members.py::test_directories_are_no_members_and_have_no_data_whatever_their_size_says""",
    "1 a member of 2 GB": """
        test_tar_members.py::test_a_member_of_two_gigabytes_is_stepped_over_in_bounded_memory
        test_traps.py::test_a_member_of_two_gigabytes_on_disk_is_an_error_row_and_its_neighbours_are_rows""",
    "2 a read error in the middle of a tar, then success: the same rows exactly once": """
        test_tokenize_shard.py::test_a_read_error_in_the_middle_and_then_success_gives_each_row_once
        test_ranged_reader.py::test_a_block_that_fails_or_has_another_length_is_asked_for_again_from_its_first_byte
        test_ranged_reader.py::test_any_mixture_of_faults_gives_the_same_bytes""",
    "3 the same key twice in a shard, in two shards, members of one sample not adjacent": """
        test_shards.py::test_each_sample_without_one_good_image_says_why_and_none_is_dropped
        test_shards.py::test_the_same_key_in_two_shards_is_no_failure
        test_shards.py::test_interleaved_members_fall_apart_as_in_webdataset_and_are_reported""",
    "3 keys with dots and folders, extensions in capitals, no image, two images": """
        test_shards.py::test_keys_extensions_and_groups_are_those_of_webdataset
        test_shards.py::test_every_format_that_is_decoded_is_found_by_its_usual_extension
        test_shards.py::test_only_the_extensions_asked_for_are_images
        test_shards.py::test_an_image_behind_a_second_dot_counts_only_where_there_is_no_plain_one
        test_traps.py::test_extensions_in_any_case_are_images_and_dotted_keys_stay_whole""",
    "4 killed between any two steps of the commit": """
        test_tokenize_shard.py::test_killed_between_any_two_steps_and_run_again_gives_identical_bytes
        test_tokenize_shard.py::test_errors_come_before_the_part_and_a_stale_errors_file_goes_before_it
        test_driver_killed.py::test_a_driver_killed_half_way_leaves_whole_parts_and_the_next_run_does_only_the_rest
        test_chaos.py::test_sixty_kills_leave_the_bytes_of_an_undisturbed_run""",
    "4 two drivers at once on one output": """
        test_two_drivers.py::test_one_of_two_drivers_does_the_work_and_the_other_ends_with_3_in_seconds
        test_lease.py::test_of_many_that_take_over_a_dead_lease_at_once_exactly_one_holds_it""",
    "5 a shard whose images are all bad": """
        test_tokenize_shard.py::test_a_shard_without_a_good_image_gives_a_valid_part_without_rows
        test_tokenize_dataset.py::test_bad_images_trip_the_budget_and_are_all_accounted_for""",
    "6 codebooks against the integer type, the range of tokens, the shape of the grid": """
        test_token_table.py::test_the_integer_type_holds_every_code_and_is_signed
        test_token_table.py::test_a_token_outside_the_codebook_is_refused_before_it_is_narrowed
        test_token_table.py::test_another_grid_is_refused_even_with_as_many_tokens
        test_traps.py::test_every_codebook_from_256_to_70000_keeps_its_largest_token""",
    "7 CMYK, palettes with transparency, 16 bits, grey and alpha, 1x1": """
        test_images.py::test_cmyk_jpegs_are_converted_without_profiles
        test_images.py::test_a_cmyk_jpeg_means_the_same_stored_as_ycck_or_without_adobes_marker
        test_images.py::test_transparent_colours_of_palettes_grey_and_rgb_are_white
        test_images.py::test_alpha_is_laid_over_white
        test_images.py::test_sixteen_bit_grey_is_scaled_with_rounding
        test_images.py::test_sixteen_bit_colour_keeps_its_upper_eight_bits
        test_images.py::test_an_image_of_one_pixel_is_refused_or_one_colour""",
    "7 EXIF rotation, animations, bombs, truncated JPEGs, extensions that lie": """
        test_images.py::test_exif_orientation_is_applied
        test_images.py::test_animations_give_their_first_frame
        test_images.py::test_a_bomb_is_refused_by_its_header_alone
        test_images.py::test_a_cut_in_the_pixels_is_told_as_that
        test_jpeg.py::test_a_picture_cut_anywhere_is_truncated_even_with_its_end_marker_put_back
        test_traps.py::test_an_extension_that_lies_changes_nothing""",
    "10 the last batch, a shard smaller than a batch, an empty one, one actor and four": """
        test_batches.py::test_batches_have_one_shape_whatever_the_number_of_samples
        test_tokenize_shard.py::test_the_encoder_sees_one_shape_only
        test_tokenize_shard.py::test_neither_threads_nor_batch_size_nor_the_worker_change_a_byte
        test_tokenize_dataset.py::test_one_actor_and_four_and_another_order_give_the_same_bytes""",
    "11 an actor killed, a poison shard": """
        test_engine_faults.py::test_shards_that_kill_break_or_exhaust_their_process_are_quarantined_with_a_telling_reason_and_no_other
        test_tokenize_dataset.py::test_an_actor_killed_while_it_holds_two_shards_costs_nothing
        test_dispatch.py::test_a_poison_shard_is_given_up_after_its_attempts_and_its_neighbour_was_never_charged""",
    "12 a library that sleeps half a second for each bad sample": """
        test_traps.py::test_bad_samples_cost_no_sleep""",
    "13 an exception inside an open file still publishes the half object": """
        test_storage.py::test_publish_that_fails_leaves_what_was_there_and_nothing_else
        test_storage.py::test_a_process_killed_while_it_publishes_leaves_a_whole_object_and_no_listed_leftovers
        test_s3.py::test_a_large_object_whose_last_part_fails_is_not_there""",
    "14 a create-only PUT whose answer is lost": """
        test_s3.py::test_create_only_is_refused_where_something_is_and_admits_its_own_success
        test_s3.py::test_swap_replaces_only_what_was_seen_and_admits_its_own_success
        test_faults.py::test_answers_that_are_refused_lost_or_late_change_nothing
        test_storage.py::test_create_is_refused_where_something_is_unless_it_is_our_own""",
    "15 503 SlowDown, resets, cut downloads, corrupted bytes, a server that hangs, stale listings": """
        test_faults.py::test_answers_that_are_refused_lost_or_late_change_nothing
        test_faults.py::test_a_storm_of_slow_downs_is_ridden_out
        test_faults.py::test_downloads_and_uploads_that_are_cut_or_damaged_change_nothing
        test_faults.py::test_a_server_that_hangs_is_asked_again
        test_shard_stream.py::test_one_damaged_byte_is_found_and_the_next_reading_is_good
        test_ranged_reader.py::test_a_cut_at_every_byte_gives_the_same_bytes
        test_ranged_reader.py::test_a_block_that_never_comes_is_given_up_and_asked_for_again
        test_shard_stream.py::test_a_download_in_one_go_that_is_cut_is_an_error_and_not_a_short_shard
        test_s3.py::test_listings_are_never_stale
        test_s3.py::test_a_server_killed_and_started_again_has_what_it_had""",
    "16 an s3fs from years ago": """
        test_traps.py::test_an_old_s3fs_cannot_be_installed""",
    "18 a store in memory is empty inside the workers": """
        test_traps.py::test_an_output_in_memory_is_refused""",
    "19 a partition that is noticed late, a cluster that dies": """
        test_pace.py::test_the_deadline_is_ten_times_the_slowest_seen_for_as_many_bytes
        test_dispatch.py::test_of_a_hung_actor_only_the_hung_shard_is_charged_and_suspected
        test_nodes_go.py::test_a_node_that_dies_or_is_cut_off_takes_no_shard_along_even_with_a_single_attempt
        test_driver_killed.py::test_a_driver_killed_half_way_leaves_whole_parts_and_the_next_run_does_only_the_rest""",
    "20 all shards submitted at once, and their outcome ignored": """
        test_dispatch.py::test_shards_go_out_in_order_and_never_more_than_the_limit_to_one_actor
        test_tokenize_shard.py::test_while_one_shards_batch_is_encoded_another_is_read_and_never_more_than_were_given
        test_tokenize_dataset.py::test_a_poison_shard_is_quarantined_and_its_neighbours_are_not_charged
        test_tokenize_dataset.py::test_a_shard_cut_at_a_member_boundary_is_quarantined_and_the_others_are_finished""",
}  # fmt: skip
WANTED = {1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20}  # those of input, storage and faults


def test_every_trap_names_tests_that_exist() -> None:
    functions = {
        f"{path.name}::{node.name}"
        for path in TESTS.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {int(trap.split()[0]) for trap in TRAPS} == WANTED
    for trap, names in TRAPS.items():
        assert names.split() and set(names.split()) <= functions, (trap, set(names.split()) - functions)


def tokenised(folder: Path, shard: Path, **table: object) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(rows, errors) of one shard."""
    spec = fake_table(**table)
    tokenizer = FakeTokenizer()
    tokenizer.codebook_size = spec.codebook_size  # type: ignore[misc]
    tokenizer.encode = lambda pixels: FakeTokenizer.encode(tokenizer, pixels) * 0 + spec.codebook_size - 1  # type: ignore[method-assign]
    job = TokenizeJob(OutputPrefix(str(folder / "out")), spec, batch_size=4, decode_threads=2)
    with closing(TokenizeWorker(tokenizer, job)) as worker:
        worker.tokenize(ShardTask(listed(shard), "part.parquet"))
    errors = folder / "out/errors/part.parquet"
    failed = pq.read_table(errors).to_pylist() if errors.exists() else []
    return pq.read_table(folder / "out/tokens/part.parquet").to_pylist(), failed


def write(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    (folder / "x.tar").write_bytes(tar_bytes(members))
    return folder / "x.tar"


def good(seed: int, format: str = "JPEG") -> bytes:
    from make_data import image_bytes

    return image_bytes(seed, format)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_member_of_two_gigabytes_on_disk_is_an_error_row_and_its_neighbours_are_rows(tmp_path: Path) -> None:
    """The file has a hole of that size, and takes no room on the disk."""
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 2 << 30
    first, last = (tar_bytes([(f"{name}.jpg", good(1))]) for name in ("first", "last"))
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(first[: len(first.rstrip(b"\0")) // 512 * 512 + 512] + huge.tobuf(tarfile.USTAR_FORMAT))
        file.seek(huge.size, 1)
        file.write(last)
    rows, errors = tokenised(tmp_path, tmp_path / "x.tar")
    assert [row["key"] for row in rows] == ["first", "last"]
    assert [(row["key"], row["reason"], row["size"]) for row in errors] == [("huge", "too_many_bytes", 2 << 30)]


def test_extensions_in_any_case_are_images_and_dotted_keys_stay_whole(tmp_path: Path) -> None:
    names = {"a.JPG": "a", "b.jpeg": "b", "c.Png": "c", "d.WEBP": "d", "0/1.1.png": "0/1", "v1.2/e.jpg": "v1.2/e"}
    formats = {"png": "PNG", "webp": "WEBP"}
    members = [(name, good(1, formats.get(name.rpartition(".")[2].lower(), "JPEG"))) for name in names]
    rows, errors = tokenised(tmp_path, write(tmp_path, members))
    assert [row["key"] for row in rows] == list(names.values()) and not errors


def test_an_extension_that_lies_changes_nothing(tmp_path: Path) -> None:
    rows, errors = tokenised(tmp_path, write(tmp_path, [("a.png", good(1)), ("b.jpg", good(1, "WEBP"))]))
    assert [row["key"] for row in rows] == ["a", "b"] and not errors


@pytest.mark.parametrize("codes", [256, 8192, 32_767, 32_768, 32_769, 65_536, 70_000])
def test_every_codebook_from_256_to_70000_keeps_its_largest_token(tmp_path: Path, codes: int) -> None:
    rows, _ = tokenised(tmp_path, write(tmp_path, [("a.jpg", good(1))]), codebook_size=codes)
    assert rows[0]["tokens"] == [codes - 1] * 4


def test_bad_samples_cost_no_sleep(tmp_path: Path) -> None:
    """webdataset's warn_and_continue would take 200 seconds."""
    started = time.monotonic()
    rows, errors = tokenised(tmp_path, write(tmp_path, [(f"{n:03d}.jpg", b"no image") for n in range(400)]))
    assert (len(rows), len(errors)) == (0, 400)
    assert time.monotonic() - started < 100


def test_an_old_s3fs_cannot_be_installed() -> None:
    """Left to itself, pip may resolve boto3 and s3fs to s3fs 0.4.2."""
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    assert any(re.match(r"s3fs>=20(2[6-9]|[3-9]\d)", line) for line in project["optional-dependencies"]["s3"])


def test_an_output_in_memory_is_refused() -> None:
    """It is one for each process: what the actors write there, nobody else would ever see."""
    values = {"checkpoint": "c", "shards": ["s"], "output": "memory://tokens"}
    with pytest.raises(ConfigError, match="a store of one process"):
        check(TokenizeConfig, values, "test")
    assert check(TokenizeConfig, {**values, "output": "tokens"}, "test").output == "tokens"
