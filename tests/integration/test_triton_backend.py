"""The Triton kernels as users call them: through `ops`, and in the gradient rows of a model.

They are interpreted on the CPU, or run on a GPU if there is one.
"""

from __future__ import annotations

import pytest
import torch

from activedpo_fast import ActiveDPOSelector, FeatureExtractor, PreferencePool, Sketch, ops
from activedpo_fast.ops import backends, reference
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from tests.ops.test_ops import KEY, random
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

pytest.importorskip("triton")
# The contents of padding are also multiplied, and the results are discarded.
pytestmark = [pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["1", "0"], ids=["deterministic", "fast"])
def triton(request, monkeypatch) -> None:
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "triton")
    monkeypatch.setenv("ACTIVEDPO_DETERMINISTIC", request.param)


@pytest.fixture(scope="module")
def tokens() -> TokenizedPool:
    pool = PreferencePool.from_rows(
        [
            {
                "prompt": "What is a sketch?",
                "responses": [" a projection", " a drawing", " no idea"],
            },
            {"prompt": "x", "responses": [" y", " zzzz"]},
        ]
    )
    return tokenize_pool(pool, tiny_tokenizer(), max_length=None, truncation_mode="keep_start")


# The sums of "rademacher" have one order, whatever ACTIVEDPO_DETERMINISTIC says.
WAYS = [
    (method, mode)
    for method in ops.METHODS
    for mode in ("1", "0")
    if (method, mode) != ("rademacher", "0")
]
each_way = pytest.mark.parametrize(("method", "triton"), WAYS, indirect=["triton"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_way
def test_outer_sketches(method, dtype, triton):
    left, right = (x.to(DEVICE, dtype) for x in (random(50, 6), random(50, 40, seed=1)))
    segments = torch.tensor([[20, 50, 2], [0, 20, 0], [7, 7, 1], [3, 30, 2]])
    wide = torch.full((3, 90), 9.0, dtype=torch.float64, device=DEVICE)
    out = wide[:, 3:83]
    ops.outer_sketch_(out, left, right, segments, KEY, method)
    exact = reference.outer_sketch(left.double(), right.double(), segments, KEY, 80, 3, method)
    # With 16-bit operands "rademacher" keeps 17 bits of a gradient's entries.
    error = (out - 9 - exact).norm(dim=1)
    assert bool((error <= 2e-5 * exact.norm(dim=1)).all())
    assert bool((wide[:, :3] == 9).all()) and bool((wide[:, 83:] == 9).all())


@pytest.mark.parametrize("operation", ["sjlt", "rademacher"])
def test_ready_rows(operation, triton):
    x = random(3, 301).float().to(DEVICE)
    out = torch.ones(3, 48, device=DEVICE)
    getattr(ops, f"{operation}_")(out, x, KEY)
    expected = 1 + getattr(reference, operation)(x.double(), KEY, 48)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "triton"),
    slow_except([("sjlt", "1"), ("kronecker", "0"), ("rademacher", "1")], WAYS),
    indirect=["triton"],
)
def test_gradient_rows_of_a_model(method, triton, tokens, monkeypatch):
    """Prompts run once, hooks, the head in chunks: everything as on the CPU, except the kernels."""
    targets = ["q_proj", "v_proj", "down_proj"]  # of three shapes
    model = lora(tiny_causal_lm("llama", num_hidden_layers=1), "llama", target_modules=targets)
    model.to(DEVICE)
    extractor = FeatureExtractor(model, Sketch(method, 96, seed=5), beta=0.5)
    found = extractor.gradients(tokens, show_progress=False)
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "reference")
    expected = extractor.gradients(tokens, show_progress=False)
    torch.testing.assert_close(found.logps, expected.logps, rtol=1e-5, atol=1e-5)
    error = (found.gradients - expected.gradients).norm(dim=1) / expected.gradients.norm(dim=1)
    assert float(error.max()) < 1e-5


@pytest.mark.gpu
def test_a_selection_on_a_gpu_is_the_cpus(monkeypatch):
    """From the model to the picks: rows stay on the GPU, where a grid makes the picks."""
    pool = PreferencePool.from_rows(
        {"prompt": f"Number {i}", "responses": [f" one {i * j} {j}" for j in range(1, 4)]}
        for i in range(40)
    )
    model = lora(tiny_causal_lm("llama"), "llama").cuda()
    picked = {}
    for backend in ("auto", "reference"):
        monkeypatch.setenv("ACTIVEDPO_BACKEND", backend)
        selector = ActiveDPOSelector(model, processing_class=tiny_tokenizer(), proj_dim=256)
        picked[backend] = selector.select(pool, 20, show_progress=False)
    assert backends.choose("greedy_select", "cuda") == "reference"
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "auto")
    assert backends.choose("greedy_select", "cuda") == "cuda"
    first, second = ([pick.responses for pick in picked[name]] for name in ("auto", "reference"))
    assert first == second
