"""`python -m tests.benchmarks.authors_over_janus`: a step built like the released code against ours.

The options and the result are those of `python -m janus_ds bench train`, with the ratios
`authors_over_janus` and `authors_over_ar` beside `janus_over_ar`, all taken in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from torch import Tensor

from janus_ds.batch import TwoStreamBatch
from janus_ds.config.schema import ObjectiveConfig
from janus_ds.model.janus import JanusModel
from janus_ds.tools.bench_common import write_json
from janus_ds.tools.bench_train import bench_train, describe, parse
from tests.benchmarks.authors_like import AuthorsLikeStep


def authors(model: JanusModel, objective: ObjectiveConfig, batch: TwoStreamBatch) -> Callable[[], Tensor]:
    step = AuthorsLikeStep(model, objective)
    return lambda: step(batch)


def main(arguments: Sequence[str]) -> int:
    bench, file = parse("authors_over_janus", "A step built like the released code against ours.", arguments)
    result = bench_train(bench, {"authors": authors})
    print(describe(result))
    if file is not None:
        write_json(file, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
