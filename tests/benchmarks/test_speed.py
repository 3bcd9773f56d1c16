"""Speed against what others would write, in fresh processes that take turns."""

import pytest
from comparisons import Comparison, comparisons
from reporting import Row


@pytest.mark.parametrize(("name", "comparison"), comparisons().items(), ids=comparisons())
def test_speed(measure, keep, name: str, comparison: Comparison):
    sides = [comparison.ours, *(rival.side for rival in comparison.rivals)]
    taken = measure(comparison.path, sides, comparison.rounds)
    rows = [
        Row(comparison, rival, tuple((each[0], each[i]) for each in taken))
        for i, rival in enumerate(comparison.rivals, 1)
    ]
    keep("benchmarks", name, rows)
