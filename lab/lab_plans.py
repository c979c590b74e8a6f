"""What is compared in each part of the study, and on how many batches."""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from lab import lab_calibration, lab_methods, lab_replicas, lab_skipping
from lab.lab_architecture import Routing
from lab.lab_cases import Course, Judge, Part, divergence
from lab.lab_methods import Method
from lab.lab_model import LabModel
from lab.lab_statistics import Tally
from sglang_macs.plan import profile

BOUNDS = (1.0, 1.05, 1.1, 1.2, 1.5)
STRESS = (0.5, 0.7, 0.85)  # below the mean: where methods part
SWEPT_AT = 0.7
SKIPPED_AT = 0.85  # where the ratio of skipping's thresholds is chosen
IMPORTANCE_AT = (0.7, 1.0, 1.05)
REDUCED_IMPORTANCE_AT = (0.7, 1.05)
PARTS = ("main", "stress", "ep16", "ep32", "sweeps", "replicas", "importance", "drift", "entropy")
# Parts that other numbers of ranks go with, and the methods that are tried there.
MORE_RANKS = {"ep16": 16, "ep32": 32}
CORE = ("random", "visual top-k", "skipping", "skipping, one threshold", "paper", "cai", "cai image-first")
CORE += ("cai device", "gate", "entropy_gate", "gate x redundancy")
# Sweeps, one option at a time: by importance, the preset and its options.
SWEEPS = {
    "entropy_gate": ("rank", {"delta": (0.0, 0.5, 1.0, 2.0, 4.0), "alpha": (0.0, 0.5, 1.0, 2.0, 4.0)}),
    "gate": ("rank", {"alpha": (0.0, 1.0, 4.0), "reroute_rounds": (1, 4, 8), "buckets": (32, 128, 256)}),
    "entropy": ("paper", {"rho": (0.0, 0.25, 0.5, 1.0), "delta": (0.0, 1.0, 4.0)}),
}


def parts_of(options: argparse.Namespace, course: Course, other: object, modality: dict) -> dict[str, Part]:
    """What is asked for, by name. other: draws training samples, for calibration."""
    count, few, bounds = options.batches, options.sweep_batches, options.bounds
    errors = 1 if options.reduced else 2
    compared = [*lab_methods.methods(modality), *skipping(course, other)]
    parts = {
        "main": Part(count, [(m, b) for b in bounds for m in compared], errors),
        "stress": Part(few, [(m, b) for b in STRESS for m in compared], errors),
        "sweeps": Part(few, sweep_plans(modality)),
    }
    experts = course.model.arch.experts
    for name, ranks in MORE_RANKS.items():
        if experts % ranks == 0:
            plans = [(m, b) for b in (*STRESS, *bounds) for m in compared if m.name in CORE]
            parts[name] = Part(few, plans, errors, ranks=ranks)
    if "replicas" not in options.skip:
        recorded = lab_calibration.rows_by_layer(course.model, other, course.mixes, course.dtype)
        placed = lab_replicas.methods(recorded, modality, 8)
        parts["replicas"] = Part(few, [(m, b) for b in (*STRESS, *bounds) for m in placed], errors)
    if "importance" not in options.skip:
        norms = lab_calibration.mean_norms(course.model, other, course.mixes, 2, course.dtype)
        at = REDUCED_IMPORTANCE_AT if options.reduced else IMPORTANCE_AT
        parts["importance"] = Part(few, importance_plans(course.model, norms, modality, at), errors, True)
    return {name: part for name, part in parts.items() if name not in options.skip}


def modality_of(model: LabModel, calibrated: profile.Profile) -> dict[int, Tensor]:
    """[E] i8 of every MoE layer."""
    return {layer: calibrated.of_layer(layer) for layer in model.arch.moe_layers}


@torch.no_grad()
def skipping(course: Course, other: object) -> list[Method]:
    """MoDES's layers' importance and ratio of thresholds, from one batch of training samples a mix."""
    calibrating = Course(course.model, other, course.mixes, course.dtype, (0,))
    cases = [calibrating.case(*spec, 8) for spec in calibrating.specs(1)]

    def change(case, seam) -> float:
        return divergence(case, course.model.decode(case.embedded, seam, course.dtype)[0])

    def without(layer: int):
        def seam(routing: Routing) -> tuple[Tensor, Tensor]:
            ids = torch.full_like(routing.ids, -1) if routing.layer == layer else routing.ids
            return ids, routing.weights.masked_fill(ids < 0, 0)

        return seam

    layers = course.model.arch.moe_layers
    lost = [sum(change(case, without(layer)) for case in cases) for layer in layers]
    importance = lab_skipping.relative(lost, layers)
    tried = {}
    for ratio in lab_skipping.RATIOS:
        (_, whole) = lab_skipping.methods(ratio, importance)
        tried[ratio] = sum(change(case, Judge(course.model, case, whole, SKIPPED_AT, Tally(), False)) for case in cases)
    return lab_skipping.methods(min(tried, key=tried.get), importance)


def sweep_plans(modality: dict) -> list[tuple[Method, float]]:
    """One option of a preset at a time."""
    plans = []
    for importance, (preset, options) in SWEEPS.items():
        for option, values in options.items():
            for value in values:
                made = {"preset": preset, "importance": importance, option: value}
                name = f"{'paper' if preset == 'paper' else importance} {option}={value}"
                plans.append((Method(name, lab_methods.WithPlan(made, modality)), SWEPT_AT))
    return plans


def importance_plans(
    model: LabModel, norms: dict[int, Tensor], modality: dict, bounds: Sequence[float]
) -> list[tuple[Method, float]]:
    """Other measures of what may be given up, each with re-routing, without, and without protecting text."""
    measures = {
        "gate": lambda given, weight: given.weights,
        "gate x mean norm": lab_methods.ByMeanNorm(norms),
        "gate x true norm": lab_methods.ByNorm(lab_calibration.true_norms(model)),
        "gate x redundancy": lab_methods.redundancy,
        "gate x detail": lab_methods.detail,
        "gate x attention": lab_methods.attention_received,
        "gate / entropy weight": lab_methods.inverse_entropy,
    }
    changes = {
        "": {},
        " -reroute": {"reroute": "none"},
        " -protection -reroute": {"reroute": "none", "protect_text": False},
    }
    plans = []
    for bound in bounds:
        made = lab_methods.WithPlan({"importance": "entropy_gate"}, modality)
        plans.append((Method("entropy_gate", made), bound))
        for name, measure in measures.items():
            for suffix, options in changes.items():
                made = lab_methods.WithPlan(options, modality, measure)
                plans.append((Method(name + suffix, made), bound))
        for name, slope in (("gate, tighter early", 0.05), ("gate, tighter late", -0.05)):
            inner = lab_methods.WithPlan({"importance": "gate"}, modality)
            made = lab_methods.ByLayer(inner, slope, model.arch.moe_layers)
            plans.append((Method(name, made, acts_above_bound_only=False), bound))
    return plans
