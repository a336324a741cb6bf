"""SLURM's short forms; tests/virtual compares them with scontrol's own answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.cluster.slurm import expand_counts, expand_hosts
from megagpt.errors import UsageError


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("login", ["login"]),
        ("host-[a-b,03-05],login", ["host-a", "host-b", "host-03", "host-04", "host-05", "login"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("gpu[098-101]-ib,x", ["gpu098-ib", "gpu099-ib", "gpu100-ib", "gpu101-ib", "x"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("a.b-c,d_e", ["a.b-c", "d_e"]),
    ],
)
def test_hosts(short, names):
    assert expand_hosts(short) == names


@given(st.integers(0, 2000), st.integers(0, 30), st.integers(1, 5))
def test_a_range_of_numbers_is_what_printf_writes(first, more, width):
    last = first + more
    names = expand_hosts(f"n[{first:0{width}d}-{last}]")
    assert names == [f"n{i:0{max(width, len(str(first)))}d}" for i in range(first, last + 1)]


@pytest.mark.parametrize("short", ["", "a,,b", ",a", "n[1-2", "n1-2]", "n[]", "n[[1]]"])
def test_what_is_no_list_of_hosts(short):
    with pytest.raises(UsageError, match=r"list of hosts '.*': not of the form name,name\[1-4"):
        expand_hosts(short)


def test_counts():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("8") == [8]


@pytest.mark.parametrize("short", ["", "2(3)", "x", "2,,1", "-1", "9" * 5000])
def test_what_is_no_list_of_counts(short):
    with pytest.raises(UsageError, match=r"tasks of the hosts '.*': not of the form 2\(x3\),1"):
        expand_counts(short)
