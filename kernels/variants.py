"""Variants to compile ahead of time: every kernel in every configuration of its launches."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

MODULES = ("hashes", "fixed_point", "gradient_bounds", "lora_grad_sketch", "sjlt_rows",
           "lora_grad_rademacher", "response_logp_grad")
# Options of every launch, besides num_warps and num_stages. Without fusion, a product is rounded
# before it is added, as on the CPU and in the interpreter, for any default of Triton (3.10 changes
# it). tl.dot is not affected.
LAUNCH = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration, as Triton would specialize it at its launch.

    Each module of `MODULES` lists its own in `variants()`. Creating a variant compiles nothing.
    """

    kernel: Any  # the function under @triton.jit
    name: str  # kernel and configuration: "lora_grad_sketch sjlt bf16 64x128x32"
    signature: dict[str, str]  # every argument, in order: "*bf16", "i64", "i32", "constexpr"
    constants: dict[str, Any]  # the values of the "constexpr" arguments
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()  # pointers and integers divisible by 16
    maxnreg: int | None = None  # maximum registers per thread; None: chosen by ptxas


def variant(kernel: Any, name: str, pointers: dict[str, str], constants: dict[str, Any],
            warps: int = 4, stages: int = 3, registers: int | None = None) -> Variant:
    """Return a variant whose kernel declares the types of its numbers.

    pointers: the types of its pointers. Those that a launch specializes are aligned. With a FIXED
    among the constants, sums are integers with bounds, or float64 without.
    """
    if "FIXED" in constants:
        pointers = {"sums": "*i64", "bounds": "*i64"} | pointers
        if not constants["FIXED"]:
            del pointers["bounds"]
            pointers["sums"] = "*fp64"
            constants = {"bounds": None} | constants
    signature = {p.name: "constexpr" if p.name in constants else
                 pointers.get(p.name, p.annotation_type) for p in kernel.params}
    aligned = tuple(p.name for p in kernel.params
                    if p.name in pointers and not p.do_not_specialize)
    return Variant(kernel, name, signature, constants, warps, stages, aligned, registers)


def all_variants() -> list[Variant]:
    """Return the variants of every kernel module, in the order of `MODULES`.

    Imports Triton. Raises ValueError if two variants share a name.
    """
    variants = [variant for module in MODULES
                for variant in import_module(f"{__package__}.{module}").variants()]
    names = [variant.name for variant in variants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several kernel variants have the same name: {', '.join(twice)}")
    return variants
