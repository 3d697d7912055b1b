"""Values and gradients of an op against its float64 reference, within what PyTorch itself manages at that dtype."""

import torch
from kernel_cases import arrange


def randn(*shape, dtype=torch.float32, device="cpu", layout="contiguous", seed=0, grad=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return arrange(x, layout).requires_grad_(grad)


def _listed(outputs):
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def run(function, tensors, gradients):
    """Outputs and gradients of `function` of these tensors (None among them is passed on), as two lists."""
    outputs = _listed(function(*tensors))
    inputs = [t for t in tensors if t is not None]
    return outputs, list(torch.autograd.grad(outputs, inputs, [g.to(o) for g, o in zip(gradients, outputs)]))


def assert_as_good_as_pytorch(op, reference, tensors, backward=True, seed=9):
    """op(*tensors) against reference(*tensors) in float64, forward and backward.

    The error may be twice that of the reference at the tensors' own dtypes, plus a rounding of the largest value: four
    in float32, where the reference may happen to be exact, and √n of them for a parameter's gradient, a sum of n terms.
    """
    double = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    with torch.no_grad():
        shapes = [o.shape for o in _listed(reference(*double))]
    gradients = [randn(*shape, seed=seed + i, grad=False).to(tensors[0].device) for i, shape in enumerate(shapes)]
    outputs, derivatives = run(op, tensors, gradients)
    expected = [sum(pair, []) for pair in (run(reference, double, gradients), run(reference, tensors, gradients))]
    results = outputs + (derivatives if backward else [])
    for i, (result, exact, plain) in enumerate(zip(results, *expected)):
        if exact.numel() == 0:
            assert result.shape == exact.shape
            continue
        assert result.shape == exact.shape and result.dtype == plain.dtype
        error, allowed = ((y.double() - exact).abs().max().item() for y in (result, plain))
        roundings = 4 if result.dtype == torch.float32 else 1
        if i >= len(outputs):
            roundings *= max(1, tensors[0].numel() / result.numel()) ** 0.5
        limit = 2 * allowed + roundings * torch.finfo(result.dtype).eps * exact.abs().max().item()
        assert error <= limit, f"result {i}: error {error:.3g}, limit {limit:.3g}"
    return outputs, derivatives


def assert_exports_with_a_dynamic_batch(op, x, *others):
    """torch.export of op(x, *others) with any batch, run at another one."""

    class Module(torch.nn.Module):
        def forward(self, x, *others):
            return op(x, *others)

    batch = {0: torch.export.Dim("batch")}
    dynamic = (batch, tuple(None for _ in others)) if others else (batch,)
    program = torch.export.export(Module(), (x, *others), dynamic_shapes=dynamic)
    assert "lpmrf." in str(program.graph)
    more = torch.cat([x, x.flip(0), x])
    for actual, expected in zip(_listed(program.module()(more, *others)), _listed(op(more, *others))):
        assert torch.equal(actual, expected)


def assert_compiles(op, tensors):
    """torch.compile without a graph break gives the same outputs, strides and gradients."""

    def around(*tensors):
        return [o + 1 for o in _listed(op(*(None if t is None else t * 2 for t in tensors)))]

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(*tensors), around(*tensors)
    inputs = [t for t in tensors if t is not None]
    gradients = [torch.ones_like(o) for o in expected]
    for actual, wanted in zip(outputs, expected):
        assert torch.equal(actual, wanted) and actual.stride() == wanted.stride()
    pairs = zip(*(torch.autograd.grad(o, inputs, gradients) for o in (outputs, expected)))
    for actual, wanted in pairs:
        assert torch.equal(actual, wanted)
