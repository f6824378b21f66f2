import torch

from entroray.policy import first_calls


def test_functions_of_mkl_are_called_once_each_on_so_few_numbers_that_one_thread_computes(
    monkeypatch,
) -> None:
    sizes = []
    monkeypatch.setattr(first_calls, "FUNCTIONS", [lambda few: sizes.append(few.numel())] * 3)
    first_calls.settle()
    assert sizes == [16, 16, 16]


def test_all_of_them_compute() -> None:
    few = torch.full((16,), 0.5)
    assert all(torch.isfinite(function(few)).all() for function in first_calls.FUNCTIONS)
