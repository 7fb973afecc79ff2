"""Commands about recipes and DeepSpeed files: `janus-ds init DIR`, `check` and `explain [KEY]`."""

from __future__ import annotations

import inspect
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ds.cli.arguments import (
    add_deepspeed_argument,
    add_ranks_arguments,
    add_recipe_arguments,
    data_ranks,
    given_overrides,
    new_parser,
    not_empty,
)
from janus_ds.config.deepspeed import ExecutionConfig, load_setup
from janus_ds.config.fields import FieldSpec
from janus_ds.config.locations import packaged_folder, user_path
from janus_ds.config.presets import MASKING_PRESETS, MODEL_PRESETS, OBJECTIVE_PRESETS
from janus_ds.config.schema import FIELDS, SECTIONS, RunConfig
from janus_ds.errors import TrainingError, UsageError, suggestion
from janus_ds.io import make_folder, write_atomic

if TYPE_CHECKING:
    from janus_ds.batch import TwoStreamBatch
    from janus_ds.data.text.tokenizer import Tokenizer
    from janus_ds.objective.janus_objective import LossReport

_DRY_SAMPLES = 2


def copy_files(arguments: Sequence[str] | None = None) -> int:
    """Copy DIR/recipes and DIR/ds_configs; files that are there already are never written over."""
    parser = new_parser("init", "Copy the package's recipes and DeepSpeed files into a folder.")
    parser.add_argument("folder", type=user_path, metavar="DIR", help="folder to copy them to")
    folder = parser.parse_args(arguments).folder
    copies = [
        (file, folder / kind / file.name)
        for kind in ("recipes", "ds_configs")
        for file in sorted(packaged_folder(kind).iterdir())
        if file.is_file() and file.suffix in (".yaml", ".json", ".md")
    ]
    there = [target for _, target in copies if target.exists()]
    if there:
        raise UsageError(f"{len(there)} of the files are there already", str(there[0]), "give another folder")
    for file, target in copies:
        make_folder(target.parent)
        write_atomic(target, file.read_bytes())
    example = shlex.quote(str(folder / "recipes" / "quickstart.yaml"))
    print(f"copied {len(copies)} files; try: janus-ds check --recipe {example} --deepspeed_config zero2")
    return 0


def print_explanation(arguments: Sequence[str]) -> int:
    """Print the text of a key, of a section, or of everything."""
    parser = new_parser("explain", "What a field of the recipe means, its type and default.")
    parser.add_argument(
        "key", nargs="?", help="such as objective.weight_aux, or a section; none: list all keys"
    )
    print(explain(parser.parse_args(arguments).key))
    return 0


def explain(key: str | None) -> str:
    """The text below a key; of all fields of a section; or the first line of every field.

    Raises:
        UsageError: there is no such key; the nearest one is named.
    """
    if key is None:
        return "\n".join(_one_line(spec) for spec in FIELDS.values())
    if key in FIELDS:
        return _whole(FIELDS[key])
    if key in SECTIONS:
        fields = [_one_line(spec) for spec in FIELDS.values() if spec.key.startswith(f"{key}.")]
        return "\n".join([f"{key}: {inspect.cleandoc(SECTIONS[key].__doc__ or '')}", "", *fields])
    fix, known = "`janus-ds explain` lists all keys", [*FIELDS, *SECTIONS]
    near = [name for name in known if key.lower() in name][:8]
    fix = f"did you mean one of {', '.join(near)}? ({fix})" if len(near) > 1 else suggestion(key, known, fix)
    raise UsageError(f"there is no key {key!r}", "explain", fix)


def _written(value: Any) -> str:
    """A value as a recipe has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _one_line(spec: FieldSpec) -> str:
    summary = spec.text.splitlines()[0]
    return f"{spec.key:<31}{_written(spec.default):<14}{summary}"


def _whole(spec: FieldSpec) -> str:
    lines = [spec.key, f"  type     {spec.type_name}", f"  default  {_written(spec.default)}"]
    if spec.choices:
        lines.append(f"  values   {', '.join(spec.choices)}")
    section, _, name = spec.key.partition(".")
    bundles = {"model": MODEL_PRESETS, "masking": MASKING_PRESETS, "objective": OBJECTIVE_PRESETS}
    presets = {preset: each[name] for preset, each in bundles.get(section, {}).items() if name in each}
    if presets:
        lines.append(
            "  presets  " + "\n           ".join(f"{p}: {_written(value)}" for p, value in presets.items())
        )
    return "\n".join([*lines, "", textwrap.indent(spec.text, "  ")])


def check(arguments: Sequence[str]) -> int:
    """Would this run start? All faults at once, then one dry batch; returns 0 if it would."""
    parser = new_parser("check", "All faults of a run's configuration at once, then one dry batch.")
    add_recipe_arguments(parser)
    add_deepspeed_argument(parser)
    parser.add_argument(
        "--data", type=not_empty, metavar="DIR", help="made by `janus-ds prepare`; or as data.path"
    )
    add_ranks_arguments(parser, 1)
    parsed = parser.parse_args(arguments)
    setup = (parsed.recipe, given_overrides(parsed), parsed.deepspeed_config, data_ranks(parsed))
    run, execution = load_setup(*setup, tensor_size=parsed.tensor_parallel, mode=parsed.mode)
    print(f"{parsed.recipe} and {parsed.deepspeed_config} are sound")
    print(_describe(run, execution, parsed.tensor_parallel))
    for kind, text in (*(("note", note) for note in execution.notes), ("advice", execution.advice)):
        if text:
            print(f"  {kind}: {text}")
    if run.data.path is None:
        if run.init is not None:
            from janus_ds.checkpoint.tensors import find_weights

            find_weights(Path(run.init))
        print("no data was given (--data DIR), so there is no dry batch")
        return 0
    _dry_batch(run, execution)
    return 0


def _describe(run: RunConfig, execution: ExecutionConfig, tensor_size: int) -> str:
    offload = ", optimizer states in host memory" if execution.offload else ""
    tokens = run.data.batch == "tokens"
    batch = f"{run.train.batch_tokens:,} tokens" if tokens else f"{run.train.global_batch:,} samples"
    micro = "micro-batches" if tokens else f"micro-batch {execution.micro_batch}"
    return (
        f"  run {run.name}: {run.train.max_steps:,} steps of {batch}, "
        f"objective {run.objective.preset}\n"
        f"  = {micro} x accumulation {execution.accumulation} x "
        f"{execution.data_size} data-parallel ranks, tensor parallel {tensor_size}\n"
        f"  ZeRO-{execution.zero_stage}, {execution.precision}{offload}, clipping at {run.optim.clip_norm}"
    )


def _dry_batch(run: RunConfig, execution: ExecutionConfig) -> None:
    """Read, mask and collate the first samples of the run, and go through the model once on the CPU.

    With the weights of `init`; and the text that is to be scored, and how, is looked at.
    """
    import torch

    from janus_ds.data.stream.loader import make_step_plan
    from janus_ds.data.stream.sample_order import RankShare
    from janus_ds.parallel.topology import Topology
    from janus_ds.progress import count_text
    from janus_ds.stream_mask import Segment
    from janus_ds.train.build_run import build_run
    from janus_ds.train.validation import OutputDecoder, scored_text

    plan = build_run(run, execution, Path("runs") / run.name, Topology(torch.device("cpu")))
    OutputDecoder(run, plan.tokenizer, torch.device("cpu"), (), scored_text(run))
    maker = plan.train
    share = RankShare(0, execution.data_size, execution.micro_batch, execution.accumulation)
    first = make_step_plan(maker, share).parts(0)[0]
    epochs, ids = (numbers[:_DRY_SAMPLES] for numbers in first)
    batch = maker.make((epochs, ids))["batches"][0]
    report = _forward(run, plan.tokenizer, batch)
    losses = {name: float(value) for name, value in report.terms.items()}
    print(f"{maker.source.name} is readable: {count_text(maker.source.samples)} samples to train on")
    layout = batch.layout
    widths = ", ".join(f"{part.name} {layout.width(part)}" for part in Segment if layout.width(part))
    print(f"dry batch: samples {ids.tolist()}, {layout.rows} decoder rows each: {widths}")
    print("  losses before training: " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))
    if not torch.isfinite(report.total):
        raise TrainingError(
            "the loss before training is not finite",
            f"samples {ids.tolist()}: {losses}",
            "look at model.init_std or the weights of init, and at the samples with `janus-ds inspect`",
        )


def _forward(run: RunConfig, tokenizer: Tokenizer, batch: TwoStreamBatch) -> LossReport:
    import torch

    from janus_ds.model.janus import JanusModel
    from janus_ds.objective.janus_objective import JanusObjective
    from janus_ds.parallel.tensor_parallel import make_layers
    from janus_ds.train.build_run import start_from

    torch.manual_seed(run.train.seed)
    parallel = make_layers(1)
    still = replace(run.model, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    model = JanusModel(still, tokenizer.special, parallel)
    if run.init is not None:
        new_head = run.init_length_head == "new"
        start_from(model, run.init, tokenizer, parallel, new_head, run.objective.length_convention)
    objective = JanusObjective(run.objective, tokenizer.special.vocab_size, parallel)
    with torch.no_grad():
        return objective(model(batch), batch, batch.counts)  # type: ignore[no-any-return]
