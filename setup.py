"""Packaging of janus_ds. deepspeed and megatron-core are pinned exactly: we lean on their inside."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "janus_ds/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
DATA = {"janus_ds.recipes": "launch/recipes", "janus_ds.ds_configs": "ds_configs"}

setup(
    name="janus_ds",
    version=VERSION,
    description="Joint autoregressive and non-autoregressive sequence-to-sequence pretraining on DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    # Recipes and DeepSpeed files lie at the top of a checkout and beside the modules of an installation.
    packages=[*find_packages(include=["janus_ds", "janus_ds.*"]), *DATA],
    package_dir=DATA,
    entry_points={"console_scripts": ["janus-ds = janus_ds.__main__:console"]},
    package_data={
        "janus_ds": ["assets/**/*", "report/templates/*", "py.typed"],
        **{name: ["*.yaml", "*.json", "*.md"] for name in DATA},
    },
    install_requires=[
        "torch>=2.6,<3",
        "deepspeed==0.19.8",
        "megatron-core==0.16.1",
        "webdataset>=1.0,<2",
        "sentencepiece>=0.2,<0.3",
        "tokenizers>=0.21,<1",
        "tensorboard>=2.16,<3",
        "sacrebleu>=2.4,<3",
        "safetensors>=0.4,<1",
        "numpy>=1.26,<3",
        "jinja2>=3.1,<4",
        "PyYAML>=6,<7",
        "pydantic>=2.10,<3",
        "zstandard>=0.22,<1",
        "fsspec>=2024.6",
    ],
    extras_require={
        "plots": ["matplotlib>=3.8,<4"],
        # Distant data: http and https need nothing, s3:// and gs:// these.
        "remote": ["s3fs>=2024.6", "gcsfs>=2024.6"],
        # Text in Parquet files, as on the Hugging Face hub.
        "parquet": ["pyarrow>=17"],
        # METEOR 1.5 itself is Java; the package carries its jar.
        "meteor": ["pycocoevalcap>=1.2,<2"],
        # Peers of the parity tests and benches.
        "hf": ["transformers>=4.57,<6", "ctranslate2>=4.6,<5"],
        "dev": [
            "transformers>=4.57,<6",
            "ctranslate2>=4.6,<5",
            "matplotlib>=3.8,<4",
            "pyarrow>=17",
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.7,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.9,<1",
            "mypy>=1.11,<3",
            "types-PyYAML",
        ],
    },
)
