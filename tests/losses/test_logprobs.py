import torch

from aligner.losses.logprobs import response_logprobs


def test_response_logprobs_by_hand() -> None:
    """Scored tokens cost 1 + 2 nats in the first row and 4 in the second."""
    nll = torch.tensor([[9.0, 1.0, 2.0, 9.0], [4.0, 9.0, 9.0, 9.0]])
    assert response_logprobs(nll, torch.tensor([1, 4]), torch.tensor([2, 1])).tolist() == [-3.0, -4.0]


def test_neither_padding_nor_packing_changes_a_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(3, 500, generator=generator) * 20
    start, length = torch.tensor([3, 0, 250]), torch.tensor([497, 77, 101])
    alone = response_logprobs(nll, start + 500 * torch.arange(3), length)
    wide = torch.nn.functional.pad(nll, (0, 77), value=1e30)
    assert torch.equal(alone, response_logprobs(wide, start + 577 * torch.arange(3), length))
    packed = torch.cat([nll[1, :77], nll[0], nll[2, :351]])[None]
    assert torch.equal(alone, response_logprobs(packed, torch.tensor([77 + 3, 0, 577 + 250]), length))


def test_tokens_of_prompts_neither_count_nor_leak() -> None:
    nll = torch.tensor([[float("inf"), 1.0]], requires_grad=True)
    logp = response_logprobs(nll, torch.tensor([1]), torch.tensor([1]))
    logp.sum().backward()
    assert nll.grad is not None
    assert logp.item() == -1.0
    assert nll.grad.tolist() == [[0.0, -1.0]]
