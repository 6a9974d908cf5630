"""Broken and unfit examples are replaced, listed and counted."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoint import BadInput
from data import Broken, Tolerant, Unfit


class Numbers:
    """Examples 0, 1, 2, ...; some are broken, some unfit."""

    def __init__(self, broken, unfit=()):
        self.broken, self.unfit, self.asked = broken, unfit, []

    def __getitem__(self, i):
        self.asked.append(i)
        if i in self.broken:
            raise Broken(f"{i} is bad")
        if i in self.unfit:
            raise Unfit(f"{i} is short")
        return i


def test_a_broken_example_is_replaced_by_the_next_and_listed_and_tried_once(tmp_path):
    numbers = Numbers({2, 3, 9})
    data = Tolerant(numbers, 10, tmp_path / "run" / "skipped.jsonl")
    for _ in range(2):
        assert [data[i] for i in range(10)] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    assert all(numbers.asked.count(i) == 1 for i in (2, 3, 9))
    again = Tolerant(Numbers({2, 3, 9}), 10, tmp_path / "run" / "skipped.jsonl")
    assert again[2] == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert lines == [{"example": i, "reason": f"{i} is bad"} for i in (2, 3, 9)]


def test_half_a_line_of_a_run_that_was_killed_does_no_harm(tmp_path):
    log = tmp_path / "skipped.jsonl"
    log.write_text('{"example": 2, "reason": "2 is bad"}\n{"example": 3, "rea')
    for _ in range(2):
        data = Tolerant(Numbers({2, 3, 9}), 10, log)
        assert [data[i] for i in range(10)] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    assert log.read_text().count('"example": 2,') == log.read_text().count('"3 is bad"') == log.read_text().count('"9 is bad"') == 1


def test_without_tolerance_the_first_broken_example_stops_the_run(tmp_path):
    with pytest.raises(BadInput, match="1 of the first 1 examples"):
        Tolerant(Numbers({0}), 10, tmp_path / "skipped.jsonl", broken_share=0)[0]


def test_too_many_broken_examples_stop_the_run(tmp_path):
    data = Tolerant(Numbers(set(range(0, 1000, 4))), 1000, tmp_path / "skipped.jsonl", broken_share=0.2)
    with pytest.raises(BadInput, match=r"10 of the first 37 examples are broken, more than 20%.*The last one: 36 is bad"):
        for i in range(1000):
            data[i]
    fine = Tolerant(Numbers(set(range(0, 1000, 4))), 1000, tmp_path / "others.jsonl", broken_share=0.3)
    assert len([fine[i] for i in range(1000)]) == 1000
    with pytest.raises(BadInput, match="None of the 5 examples can be used"):
        Tolerant(Numbers(set(range(5))), 5, tmp_path / "none.jsonl")[0]


def test_what_is_unfit_is_listed_and_does_not_count(tmp_path, capfd):
    """Nine of ten are too short, as the user has said they should be skipped; one in twenty of all is broken."""
    broken = set(range(10, 1000, 20))
    unfit = {i for i in range(1000) if i % 10} - broken
    data = Tolerant(Numbers(broken, unfit), 1000, tmp_path / "skipped.jsonl", broken_share=0.1)
    assert {data[i] for i in range(1000)} == set(range(0, 1000, 10)) - broken
    assert (tmp_path / "skipped.jsonl").read_text().count("is short") == 900 and not capfd.readouterr().err
    strict = Tolerant(Numbers(set(), unfit), 1000, tmp_path / "strict.jsonl", broken_share=0)
    assert strict[1] == 10
    none = Tolerant(Numbers((), range(1000)), 1000, tmp_path / "none.jsonl", broken_share=0)
    for _ in range(2):
        with pytest.raises(BadInput, match="None of the 1000 examples can be used; .*none.jsonl says why"):
            none[3]
    assert capfd.readouterr().err.count("none of the first 100 examples can be used") == 1


def test_ranks_list_an_example_once(tmp_path):
    """Each meets the broken ones at its own time, and all write to one file."""
    ranks = [Tolerant(Numbers({2, 3, 9}), 10, tmp_path / "skipped.jsonl") for _ in range(3)]
    for i in (0, 3, 2, 9, 5):
        with ThreadPoolExecutor(len(ranks)) as at_once:
            assert len(set(at_once.map(lambda rank: rank[i], ranks))) == 1
    assert [json.loads(line)["example"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [3, 2, 9]
