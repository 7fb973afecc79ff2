"""janus_ds: pretrain, fine-tune and decode sequence-to-sequence models that generate both ways.

The system of the paper "JANUS: Joint Autoregressive and Non-autoregressive Training with Auxiliary
Loss for Sequence Generation" (EMNLP 2022), on DeepSpeed. Importing the package stays light: the
heavy parts (torch, deepspeed, megatron-core) are imported by the modules that need them.
"""

import os

__version__ = "0.1.0"

# Threads that wait sleep, unless the user says otherwise; torch reads it when it is loaded. Spinning ones
# take the cores that others need: beside other work, training was five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
