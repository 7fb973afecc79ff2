"""Options that train the same losses from fewer rows: another estimator, cheaper a step, off by default.

`objective.ar_loss: masked` sums the AR loss over the masked tokens and eos alone; `objective.aux_share`
trains AUX and the KL terms on a part of the sentences. What either leaves out is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from janus_ds.config.faults import FaultList
from janus_ds.config.schema import ObjectiveConfig, RunConfig

__all__ = ["check_estimator", "estimator_name", "full_estimator"]


def estimator_name(objective: ObjectiveConfig) -> str:
    """In words, what the losses are summed over: "full" where nothing is left out."""
    parts = []
    if objective.ar_loss == "masked":
        parts.append("AR loss on masked tokens and eos only")
    if objective.aux_share < 1:
        parts.append(f"AUX and KL on {objective.aux_share:.0%} of the sentences")
    return "; ".join(parts) or "full"


def full_estimator(run: RunConfig) -> RunConfig:
    """The same run with nothing left out of its losses: what validation measures.

    Without dropout there is one draw: two are equal, and their KL is 0.
    """
    one_draw = replace(run.objective, weight_kl_ar_ar=0.0, weight_kl_nar_nar=0.0, weight_kl_aux_aux=0.0)
    return replace(run, objective=replace(one_draw, ar_loss="all", aux_share=1.0))


def check_estimator(run: RunConfig, where: Callable[[str], str], faults: FaultList) -> None:
    """Refuse a part of something that is not there, and what cannot work on parts."""
    objective = run.objective
    if objective.ar_loss == "masked" and not _has_masked_queries(objective):
        faults.add(
            "objective.ar_loss 'masked' needs AR queries and masked tokens, and this objective does not "
            "train AR queries together with NAR or AUX",
            where("objective.ar_loss"),
            "use objective.ar_loss all, or a preset with both streams (paper, released)",
            ["objective.ar_loss", "objective.preset", "objective.ar_stream"],
        )
    if objective.aux_share >= 1:
        return
    keys = ["objective.aux_share"]
    if not (objective.weight_aux or objective.weight_kl_ar_aux or objective.weight_kl_nar_aux):
        faults.add(
            f"objective.aux_share is {objective.aux_share}, but neither AUX nor a KL term with it is trained",
            where("objective.aux_share"),
            "leave objective.aux_share out, or give objective.weight_aux a number above 0",
            [*keys, "objective.weight_aux"],
        )
    if run.train.attention_backend not in ("auto", "grouped"):
        faults.add(
            f"train.attention_backend {run.train.attention_backend!r} cannot leave out the AUX rows of some "
            "sentences, as objective.aux_share asks for",
            where("train.attention_backend"),
            "use auto, or objective.aux_share 1",
            [*keys, "train.attention_backend"],
        )
    if run.train.compile == "graphs":
        faults.add(
            "CUDA graphs need few shapes, but under objective.aux_share every batch has its own",
            where("train.compile"),
            "use train.compile model or head, or objective.aux_share 1",
            [*keys, "train.compile"],
        )


def _has_masked_queries(objective: ObjectiveConfig) -> bool:
    ar = objective.weight_ar or objective.weight_kl_ar_nar or objective.weight_kl_ar_aux
    masked = objective.weight_nar or objective.weight_aux
    masked = masked or objective.weight_kl_ar_nar or objective.weight_kl_ar_aux or objective.weight_kl_nar_aux
    return bool(ar and masked and objective.ar_stream == "query")
