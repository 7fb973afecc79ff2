"""A training step by the naive reference, sample by sample and stream by stream: total, gradients, terms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor

from janus_ds.batch import Ragged, TwoStreamBatch
from janus_ds.config.schema import ObjectiveConfig
from janus_ds.data.masking.collate import Collator
from janus_ds.data.masking.views import Views
from janus_ds.model.janus import JanusModel
from tests.support.naive_reference import NaiveJanus, NaiveShape
from tests.support.plain_losses import label_smoothed_cross_entropy, symmetric_kl
from tests.support.two_stream import TOY, Conventions, Sample, ar_rows

STREAMS = ("ar", "nar", "aux")
PAIRS = [f"{a}_{b}" for a, b in combinations_with_replacement(STREAMS, 2)]
Draws = Callable[[dict[str, Tensor], NaiveShape, int, int], NaiveJanus]
"""The reference under one dropout draw of the encoder and one of the decoder."""


def views_of(samples: list[Sample]) -> Views:
    """The product's views of these samples; AUX goes through the masked tokens in the order given."""
    target = Ragged.from_rows([s.target for s in samples])
    masked, order = np.zeros(len(target.values), dtype=bool), np.zeros(len(target.values), dtype=np.uint64)
    for start, sample in zip(target.offsets, samples, strict=False):
        places = start + np.array(sample.masked, dtype=np.int64)
        masked[places], order[places] = True, np.arange(len(places))
    return Views(Ragged.from_rows([s.source for s in samples]), target, masked, order=order)


def collated(samples: list[Sample], objective: ObjectiveConfig, classes: int) -> TwoStreamBatch:
    """The product's batch of these samples."""
    return Collator(TOY, objective, classes, 2)(views_of(samples), np.arange(len(samples)))


def naive_step(
    model: JanusModel,
    objective: ObjectiveConfig,
    samples: list[Sample],
    draws: Draws = lambda leaves, shape, *_: NaiveJanus(leaves, shape),
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Total, gradient of every parameter (of the table's real rows), and terms that have a weight."""
    config = model.config
    leaves = {n: p.detach().clone() for n, p in model.named_parameters()}
    leaves["embedding.weight"] = leaves["embedding.weight"][: TOY.vocab_size].clone()
    leaves = {n: p.requires_grad_() for n, p in leaves.items()}
    scale = config.d_model**0.5 if config.scale_embedding else 1.0
    shape = NaiveShape(config.heads, config.encoder_layers, config.decoder_layers, config.activation, scale)
    weights = {n: float(getattr(objective, f"weight_{n}")) for n in (*STREAMS, "length")}
    weights |= {f"kl_{pair}": float(getattr(objective, f"weight_kl_{pair}")) for pair in PAIRS}
    sums = dict.fromkeys(weights, torch.zeros((), dtype=torch.float64))
    counts = dict.fromkeys(("ar", "masked", "length", "target"), 0)
    classes = config.length_classes or config.max_target_positions
    for sample in samples:
        found = []
        for draw in range(objective.dropout_draws):
            # Draws of the encoder: with two passes AR has its own. A doubled batch has one draw a half.
            other = 1 - draw if objective.encoder_passes == 2 else draw
            naive = draws(leaves, shape, draw, draw), draws(leaves, shape, other, draw)
            found.append(_rows(*naive, objective, sample))
            inner = len(sample.target) - (0 if objective.length_convention == "with_specials" else 2)
            length = naive[1].length(sample.source)[None]
            right_N = torch.tensor([min(inner, classes - 1)])
            sums["length"] = sums["length"] + label_smoothed_cross_entropy(length, right_N, 0.0)[1].sum()
        gold = [sample.target[p] for p in sample.masked]
        how = _conventions(objective)
        predicted = ar_rows(sample.target, how)[1]
        of_masked = [p - (how.start == "bos") for p in sample.masked]
        for rows in found:
            for name, logits in rows.items():
                right = predicted if name == "ar" else gold
                eps, right_N = objective.label_smoothing or 0.0, torch.tensor(right, dtype=torch.int64)
                sums[name] = sums[name] + label_smoothed_cross_entropy(logits, right_N, eps)[0].sum()
            on_masked = {n: rows[n][of_masked] if n == "ar" else rows[n] for n in rows}
            for pair in PAIRS:
                a, b = pair.split("_")
                if a != b and a in rows and b in rows:
                    sums[f"kl_{pair}"] = sums[f"kl_{pair}"] + symmetric_kl(on_masked[a], on_masked[b]).sum()
        for name in found[0] if len(found) == 2 else ():
            again = symmetric_kl(found[0][name], found[1][name]).sum()
            sums[f"kl_{name}_{name}"] = sums[f"kl_{name}_{name}"] + again
        for name, count in (("ar", len(predicted)), ("masked", len(gold)), ("length", 1)):
            counts[name] += count
        counts["target"] += len(sample.target)
    own = {"ar": "ar", "kl_ar_ar": "ar", "length": "length"}
    total, terms = torch.zeros((), dtype=torch.float64), {}
    for name, weight in weights.items():
        copies = 1 if name in ("kl_ar_ar", "kl_nar_nar", "kl_aux_aux") else objective.dropout_draws
        count = counts[own.get(name, "masked")]
        divisor = counts["target"] if objective.normalise == "target_tokens" else count
        if weight:
            terms[name] = float(sums[name] / (count * copies))
            total = total + weight * sums[name] / (divisor * copies)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named = zip(leaves.items(), gradients, strict=True)
    return total.detach(), {n: torch.zeros_like(p) if g is None else g for (n, p), g in named}, terms


def _conventions(objective: ObjectiveConfig) -> Conventions:
    return Conventions(
        query_position=str(objective.ar_query_position),
        start=str(objective.decoder_start),
        mask=TOY.unk if objective.mask_symbol == "unk" else TOY.mask,
    )


def _rows(
    first: NaiveJanus, second: NaiveJanus, objective: ObjectiveConfig, sample: Sample
) -> dict[str, Tensor]:
    """Logits of the streams that some weight asks for: AR by the first, NAR and AUX by the second."""
    terms = [*STREAMS, *(f"kl_{pair}" for pair in PAIRS)]
    asked = {name for term in terms if getattr(objective, f"weight_{term}") for name in term.split("_")}
    how, found = _conventions(objective), {}
    if "ar" in asked:
        content, _, at, query_at = ar_rows(sample.target, how)
        query = [(how.mask, p) for p in query_at] if objective.ar_stream == "query" else []
        found["ar"] = first.ar(sample.source, list(zip(content, at, strict=True)), query)
    for name in ("nar", "aux"):
        if name in asked:
            found[name] = getattr(second, name)(sample.source, sample.target, sample.masked, how.mask)
    return found


def assert_same_gradients(model: JanusModel, expected: dict[str, Tensor], tolerance: float) -> None:
    """Of every parameter; rows of the table beyond the vocabulary take no part."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert not found["embedding.weight"][TOY.vocab_size :].any()
    found["embedding.weight"] = found["embedding.weight"][: TOY.vocab_size]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < tolerance, name
