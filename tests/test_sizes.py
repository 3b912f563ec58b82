import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbd_hub.errors import SizeError
from cbd_hub.sizes import format_bytes, format_size, matches, parse_bytes, parse_size


@pytest.mark.parametrize(("text", "parameters"), [("138M", 138_000_000), ("1.1B", 1_100_000_000), ("54K", 54_000), ("54k", 54_000), (" 7 M ", 7_000_000), ("12", 12), (5, 5), (np.int64(7), 7)])
def test_sizes_are_read(text, parameters):
    assert parse_size(text) == parameters
    assert type(parse_size(text)) is int


@pytest.mark.parametrize("wrong", ["138Q", "", "M", "-3M", "0", "0M", "1e6", "nan", "inf", "1.5.2M", "٣M" * 20, "9" * 50 + "T", 0, -1, True, 1.5, None])
def test_what_is_no_size_is_refused_with_an_example(wrong):
    with pytest.raises(SizeError, match="138M"):
        parse_size(wrong)


@given(st.integers(1, 10**14))
def test_a_formatted_size_is_read_back_within_its_digits(parameters):
    assert abs(parse_size(format_size(parameters)) - parameters) <= 0.005 * parameters + 1
    assert matches(format_size(parameters), parse_size(format_size(parameters)))


def test_text_means_an_anchor_that_rounds_to_it():
    assert matches("135M", 134_515_008)
    assert matches("134.5M", 134_515_008)
    assert not matches("134M", 134_515_008)
    assert matches("1.5B", 1_543_714_304)
    assert not matches("1B", 1_235_814_400), "one digit is no licence to be a quarter off"


def test_bytes_are_read_from_plain_digits_too():
    assert (parse_bytes("300000"), parse_bytes(" 7 "), parse_bytes("300kB")) == (300_000, 7, 300_000)
    for wrong in ("0", "1.5", "-3", "300K"):
        with pytest.raises(SizeError, match="no count of bytes"):
            parse_bytes(wrong)


def test_bytes_are_decimal():
    assert format_bytes(538_090_408) == "538 MB"
    assert format_bytes(999) == "999 B"
    assert format_bytes(1_500) == "1.5 kB"
