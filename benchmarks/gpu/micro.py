"""The section "micro" of `benchmarks.gpu`: each kernel next to its floor and its peers.

A floor is the time of the least bytes at the bandwidth of a copy on the same device, or of the
least operations at the rate of a bfloat16 matrix product, whichever is longer; both rates are
measured first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu import micro_peers as peers
from benchmarks.gpu.cases import Case, Found, Record, Settings, Skip
from benchmarks.gpu.micro_inputs import Gradients, Logits, Matrix
from benchmarks.gpu.timing import Timer, copy_bandwidth, input_sets, matrix_rate, wall_seconds

COPY, PRODUCT = "ceiling: copy on the device", "ceiling: bf16 matrix product"
COMPILE_LIMIT = 40.0
KEY = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Contender:
    """A way to do the work of a group.

    make(inputs): the call to be timed; its result is compared with the definition's unless the
        contender has its `own_tables` of random numbers.
    executed: how many times the operations of the definition it carries out, for its share of the
        matrix rate; None where that says nothing.
    compiled: whether its first call compiles it.
    rotates: whether inputs are to be rotated; not where it reads more than the cache holds anyway.
    """

    name: str
    make: Callable[[Any], Callable[[], Any]]
    executed: float | None = None
    compiled: bool = False
    own_tables: bool = False
    rotates: bool = True

    @property
    def ours(self) -> bool:
        return self.name.startswith("**ours**")


# (group, shape, a maker of inputs, contenders, ours first)
Group = tuple[str, str, Any, list[Contender]]


def cases(settings: Settings) -> list[Case]:
    """The ceilings, then ours in every group and shape, then the peers."""
    timer = Timer(settings)
    found = [
        Case(COPY, lambda _: copy_bandwidth(settings, timer)),
        Case(PRODUCT, lambda _: matrix_rate(settings, timer)),
    ]
    work = [
        (group, shape, inputs, contender)
        for group, shape, inputs, contenders in groups(settings)
        for contender in contenders
    ]
    # If time runs out, the slow cases that say least about our kernels are missing.
    work.sort(key=lambda item: (not item[3].ours, item[3].compiled))
    for group, shape, inputs, contender in work:
        found.append(
            Case(
                f"{group}, {shape}: {contender.name}",
                partial(_measure, group, shape, inputs, contender, settings, timer),
                limit=1.5 * COMPILE_LIMIT,
            )
        )
    return found


def groups(settings: Settings) -> list[Group]:
    """Every operation at every shape."""
    return [*_sketches(settings), *_logps(settings), *_updates(settings)]


def _sketches(settings: Settings) -> Iterator[Group]:
    tiny = settings.tiny
    d, k, tokens, ranks = (16, 32, 3, (4,)) if tiny else (4096, 8192, 300, (16, 128))
    count = 2 if tiny else 16
    for rank in ranks:
        for side in ("A",) if tiny else ("A", "B"):
            inputs = Gradients(side, rank, d, k, count, tokens, KEY)
            plain = side == "A"  # the other side has as many numbers: peers are measured once
            compiled = plain and rank == ranks[0]
            for method in ("sjlt", "kronecker"):
                contenders = _sparse(method, plain, compiled, settings)
                yield method, inputs.shape(), inputs.of(method), contenders
            dense = _dense(plain, compiled, settings)
            yield "rademacher", inputs.shape(), inputs.of("rademacher"), dense
    many = Gradients("A", ranks[0], d, k, 3 if tiny else 8 * count, tokens, KEY)
    yield "rademacher", many.shape(), many.of("rademacher"), _dense(False, False, settings)


def _logps(settings: Settings) -> Iterator[Group]:
    compiled = partial(peers.compiled_logps, settings=settings)
    for vocabulary in (50,) if settings.tiny else (32_000, 128_256):
        logits = Logits(3 if settings.tiny else 2048, vocabulary)
        contenders = [
            Contender("**ours**", peers.ours_logps),
            Contender("PyTorch", peers.plain_logps),
            Contender("torch.compile", compiled, compiled=True),
        ]
        yield "response_logp_grad", logits.shape(), logits, contenders


def _updates(settings: Settings) -> Iterator[Group]:
    for rows in (2,) if settings.tiny else (1, 64):
        matrix = Matrix(16 if settings.tiny else 8192, rows)
        contenders = [
            Contender("**ours**", peers.ours_update),
            Contender("PyTorch", peers.plain_update),
        ]
        yield "rank_update", matrix.shape(), matrix, contenders


def _sparse(method: str, plain: bool, compiled: bool, settings: Settings) -> list[Contender]:
    found = [
        Contender("**ours**", partial(peers.ours_sparse, method=method, deterministic=False)),
        Contender(
            "**ours**, the same bits on every run",
            partial(peers.ours_sparse, method=method, deterministic=True),
        ),
    ]
    if plain and method == "sjlt":
        found += [
            Contender("PyTorch, gradients formed", peers.plain_sjlt),
            Contender("sjlt, gradients formed", peers.package_sjlt, own_tables=True),
        ]
    if compiled and method == "sjlt":
        found.append(
            Contender(
                "torch.compile, gradients formed",
                partial(peers.compiled_sjlt, settings=settings),
                compiled=True,
            )
        )
    return found


def _dense(plain: bool, compiled: bool, settings: Settings) -> list[Contender]:
    found = [Contender("**ours**", peers.ours_rademacher, executed=peers.PIECES)]
    if plain:
        found += [
            Contender(
                "PyTorch, gradients and signs formed",
                peers.plain_rademacher,
                executed=1.0,
                rotates=False,
            ),
            Contender("fast_jl, gradients formed", peers.fast_jl, own_tables=True),
        ]
    if compiled:
        found.append(
            Contender(
                "torch.compile, gradients and signs formed",
                partial(peers.compiled_rademacher, settings=settings),
                compiled=True,
                rotates=False,
            )
        )
    return found


def _measure(
    group: str,
    shape: str,
    inputs: Any,
    contender: Contender,
    settings: Settings,
    timer: Timer,
    found: Found,
) -> Record:
    ceilings = [found.get(name, {}) for name in (COPY, PRODUCT)]
    if any(ceiling.get("status") != "ok" for ceiling in ceilings):
        raise Skip("the ceilings were not measured")
    first = inputs.make(settings.device, 0)
    call = contender.make(first)
    results: list[Any] = []
    first_seconds = wall_seconds(lambda: results.append(call()), settings.device)
    if contender.compiled and first_seconds > COMPILE_LIMIT:
        raise Skip(f"compiling takes {first_seconds:.0f} s")
    error = None if contender.own_tables else inputs.error(first, results.pop())
    sets = input_sets(inputs.bytes(), settings) if contender.rotates else 1
    others = [inputs.make(settings.device, i) for i in range(1, sets)]
    times = timer([call, *map(contender.make, others)])
    bandwidth, rate = ceilings[0]["bytes_a_second"], ceilings[1]["flops_a_second"]
    floor = max(inputs.bytes() / bandwidth, inputs.flops() / rate)
    record = {
        "group": group,
        "shape": shape,
        "contender": contender.name,
        "ours": contender.ours,
        **times,
        "bytes": inputs.bytes(),
        "flops": inputs.flops(),
        "floor_seconds": floor,
        "times_floor": times["seconds"] / floor,
        "error": error,
        "first_seconds": first_seconds,
    }
    if contender.executed is not None:
        share = inputs.flops() / times["seconds"] / rate
        record |= {"useful_share": share, "executed_share": share * contender.executed}
    return record
