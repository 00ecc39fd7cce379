"""``pysolve.nn.overrides``: calls of torch's functions, seen or changed."""

import torch

from pysolve.nn.overrides import Overriding


class Doubling(Overriding):
    """Relus twice as large; writes down what it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, func, args, kwargs):
        self.seen.append((func, kwargs))
        return func(*args, **kwargs) * (2 if func is torch.relu else 1)


def test_calls_inside_are_seen_with_their_arguments_and_their_results_take_the_place():
    x, functions = torch.tensor([-1.0, 3.0]), Doubling()
    with functions:
        made = torch.relu(x), torch.add(x, x, alpha=0.5)
    assert [one.tolist() for one in made] == [[0.0, 6.0], [-1.5, 4.5]]
    assert functions.seen == [(torch.relu, {}), (torch.add, {"alpha": 0.5})]
    assert torch.relu(x).tolist() == [0.0, 3.0]


def test_what_a_call_makes_of_its_keyword_arguments_is_its_own():
    class Taking(Overriding):
        def call(self, func, args, kwargs):
            return func(kwargs.pop("input"), **kwargs)

    given = {"input": torch.ones(2)}
    with Taking():
        made = torch.relu(**given)
    assert made.tolist() == [1.0, 1.0]
    assert [*given] == ["input"]
