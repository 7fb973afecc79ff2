"""Where the package's files lie; all else stands in pyproject.toml."""

from setuptools import find_packages, setup

# Recipes and DeepSpeed files lie at the top of a checkout and beside the modules of an installation.
DATA = {"janus_ds.recipes": "launch/recipes", "janus_ds.ds_configs": "ds_configs"}

setup(
    packages=[*find_packages(include=["janus_ds", "janus_ds.*"]), *DATA],
    package_dir=DATA,
    package_data={
        "janus_ds": ["assets/**/*", "report/templates/*", "model/decoding/*.cpp", "py.typed"],
        **{name: ["*.yaml", "*.json", "*.md"] for name in DATA},
    },
)
