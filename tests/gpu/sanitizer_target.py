"""Every CUDA C++ kernel at odd sizes, for compute-sanitizer; run by test_sanitizer.py."""

import torch

from fda_fast.ops import adamw, alignment, coefficients

torch.manual_seed(0)
for shape in ((1, 1), (3, 7), (2, 4096), (5, 1031)):
    x, g, m, v, best = (torch.rand(shape, device="cuda") for _ in range(5))
    loss, best_loss = (torch.rand(shape[0], device="cuda") for _ in range(2))
    history = torch.zeros(4, shape[0], device="cuda")
    for step in (1, torch.tensor(7, device="cuda")):
        adamw.step_(x, g, m, v, step, loss, best_loss, best, 1e-2, history=history, backend="cuda")
        row = [one[0].clone() for one in (g, m, v, best)]
        coefficients.update_(x, g, *row, step, 1e-2, backend="cuda")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for rows, widths in ((1, (1,)), (3, (5, 7)), (70, (512, 1024)), (9, (4, 8, 12))):
        g, u, w = (torch.randn(2, rows, sum(widths), device="cuda").to(dtype) for _ in range(3))
        alpha, beta = torch.randn(2, 2, len(widths), device="cuda")
        row = torch.randn(2, sum(widths), device="cuda").to(dtype)
        alignment.dots(g, u, w, widths, backend="cuda")
        squares = torch.rand(2, len(widths), device="cuda")
        active = torch.ones(len(widths), dtype=torch.bool, device="cuda")
        terms = [alignment.Term(g, u, g, widths, range(len(widths)))]
        alignment.evaluate(terms, squares, active, backend="cuda")
        alignment.mix(alpha, u, beta, w, widths, row, backend="cuda")
for terms in (1, 33):
    alignment.coefficients(
        torch.rand(2, 3, terms, device="cuda"),
        torch.rand(3, terms, device="cuda"),
        torch.ones(terms, dtype=torch.bool, device="cuda"),
        backend="cuda",
    )
torch.cuda.synchronize()
print("done")
