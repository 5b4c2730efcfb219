"""The bytes of a part beside what its codes must take at the least."""

from __future__ import annotations

import pytest

from measure_table_size import drawn, entropy_bits, whole_part_bytes


@pytest.mark.parametrize("bits", [11.86, 12.5])
def test_a_part_takes_at_most_1_12_times_the_entropy_of_codes_that_are_used(bits: float) -> None:
    tokens_BN = drawn(4096, 1024, 8192, bits)
    assert entropy_bits(tokens_BN) == pytest.approx(bits, abs=0.02)
    assert 1.0 < whole_part_bytes(tokens_BN, 8192) * 8 / 1024 / entropy_bits(tokens_BN) < 1.12


def test_the_entropy_is_that_of_the_shares() -> None:
    tokens_BN = drawn(500, 64, 16, 4.0)
    assert entropy_bits(tokens_BN) == pytest.approx(4.0, abs=0.01)
    assert entropy_bits(tokens_BN * 0) == 0.0
