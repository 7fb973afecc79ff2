"""Mode `ar` with BART's weights is BART: logits, beam search and files against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.cli.convert import main
from janus_ds.decode.load import LoadedRun, load_run
from janus_ds.model.decoding.cache import ArStream
from tests.support.hf_models import SHAPES, build_bart, padded_sources
from tests.support.two_stream import Conventions, Sample, make_batch

transformers = pytest.importorskip("transformers")

LENGTHS = {"small": [12, 5, 31, 3], "long": [480, 500, 17]}
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request: Any, tmp_path_factory: Any) -> tuple[str, Any, LoadedRun, Path]:
    """A random BART of transformers, and the run that it was converted to."""
    folder = tmp_path_factory.mktemp(request.param)
    bart = build_bart(SHAPES[request.param])
    bart.save_pretrained(folder / "hf")
    assert main(["--from", "hf", str(folder / "hf"), "--to", str(folder / "run")]) == 0
    return request.param, bart, load_run(folder / "run"), folder


def sources_of(name: str) -> tuple[Tensor, Tensor]:
    return padded_sources(SHAPES[name].vocab_size, LENGTHS.get(name, [20, 9, 33]))


def theirs(bart: Any, source_BS: Tensor, mask_BS: Tensor, target_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return bart(input_ids=source_BS, attention_mask=mask_BS, decoder_input_ids=target_BT).logits


def difference(a: Tensor, b: Tensor, valid: Tensor) -> float:
    return float((a - b).abs()[valid].max())


def test_logits_are_those_of_transformers(pair: Any) -> None:
    name, bart, run, _ = pair
    source_BS, mask_BS = sources_of(name)
    lengths = [17, 4, 30, 9][: len(source_BS)] if name != "long" else [470, 33, 512]
    target_BT, target_mask_BT = padded_sources(SHAPES[name].vocab_size, lengths, seed=2)
    # transformers' own shift: </s> first, labels are `<s> .. </s>`.
    shifted_BT = target_BT.roll(1, dims=1)
    shifted_BT[:, 0] = 2
    valid = target_mask_BT.bool()
    expected = theirs(bart, source_BS, mask_BS, shifted_BT)
    rows = zip(source_BS, mask_BS.bool(), target_BT, valid, strict=True)
    samples = [Sample(source[s].tolist(), target[t].tolist(), []) for source, s, target, t in rows]
    batch = make_batch(samples, Conventions(start="eos_bos", rows=frozenset({"arc"})))
    with torch.no_grad():
        rows = run.model(batch)
        ours = run.model.logits(rows.ar_BAD)[:, : target_BT.shape[1]]
        worst = difference(ours, expected, valid)
        spread = float(expected[valid].std())
        # The same through the cache, one step after the other.
        memory = run.model.encode(source_BS, mask_BS.sum(1))
        stream = ArStream.of(run.config.objective, run.special)
        steps = min(target_BT.shape[1], 40)
        cache = run.model.start_cache(memory, stream, 1, steps)
        cached = [
            run.model.logits(run.model.ar_block(cache, shifted_BT[:, None, t : t + 1])[:, 0])
            for t in range(steps)
        ]
        worst_cached = difference(torch.cat(cached, 1), expected[:, :steps], valid[:, :steps])
    print(f"\n{name}: logits {worst:.1e}, cached {worst_cached:.1e}, their spread {spread:.2f}")
    assert spread > 0.5
    assert worst < TOLERANCE
    assert worst_cached < TOLERANCE


def test_exported_models_are_the_same_again(pair: Any) -> None:
    name, bart, _, folder = pair
    assert main(["--to", "hf", str(folder / "run"), "--output", str(folder / "back")]) == 0
    back = transformers.BartForConditionalGeneration.from_pretrained(folder / "back").eval()
    state = back.state_dict()
    for key, value in bart.state_dict().items():
        start = 2 if "embed_positions" in key else 0
        assert torch.equal(state[key][start:], value[start:]), key
    assert back.lm_head.weight.data_ptr() == back.model.shared.weight.data_ptr()
    assert not back.final_logits_bias.any()
    source_BS, mask_BS = sources_of(name)
    target_BT, _ = padded_sources(SHAPES[name].vocab_size, [9] * len(source_BS), seed=3)
    assert torch.equal(
        theirs(back, source_BS, mask_BS, target_BT), theirs(bart, source_BS, mask_BS, target_BT)
    )
