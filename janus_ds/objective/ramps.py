"""Loss weights that rise along a run: what each weight is multiplied by at a step, and nothing kept.

Strong KL from the first update pulls three uninformed distributions together; ramps let the losses
settle first. A pure function of the step, so that a resumed run continues its ramps.
"""

from __future__ import annotations

from janus_ds.config.schema import ObjectiveConfig

__all__ = ["ramp_factors"]


def ramp_factors(config: ObjectiveConfig, step: int) -> dict[str, float]:
    """Factors between 0 and 1 by loss term, for update `step`, counted from 0; terms without a ramp are 1.

    Before `ramp_start` a ramped term has factor 0; the first update of a ramp of n has 1/n, the n-th 1.
    """
    steps = {
        "nar": config.ramp_nar_steps,
        "aux": config.ramp_aux_steps,
        **{f"kl_{pair}": config.ramp_kl_steps for pair in ("ar_nar", "ar_aux", "nar_aux")},
    }
    done = max(step + 1 - config.ramp_start, 0)
    return {term: min(done / length, 1.0) for term, length in steps.items() if length}
