"""JANUS written down as the method describes it, one sample and one way of predicting at a time.

Separate passes for AR, NAR and AUX, each with an encoder pass of its own; content and query streams as
two tensors; masks filled in cell by cell; plain softmax attention. Nothing here
imports the package: only the parameter names are shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = Sequence[tuple[int, int]]
"""(token, position) of each row."""


@dataclass(frozen=True)
class NaiveShape:
    """What the parameters alone do not tell."""

    heads: int
    encoder_layers: int
    decoder_layers: int
    activation: str
    scale: float


class NaiveJanus:
    """The model as functions of a dict of parameters."""

    def __init__(self, parameters: dict[str, Tensor], shape: NaiveShape) -> None:
        self.p = parameters
        self.shape = shape

    def drop(self, side: str, x: Tensor) -> Tensor:
        """What stands where dropout is: nothing here. `side` is encoder or decoder."""
        return x

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def attend(self, name: str, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Rows x attend to rows y; mask[i, j] says whether x_i may see y_j."""
        q, k, v = self.linear(f"{name}.q", x), self.linear(f"{name}.k", y), self.linear(f"{name}.v", y)
        width = q.shape[1] // self.shape.heads
        outputs = []
        for head in range(self.shape.heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            outputs.append(weights @ v[:, part])
        return self.linear(f"{name}.out", torch.cat(outputs, 1))

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        side = name.split(".")[0]
        inner = self.linear(f"{name}.fc1", x)
        if self.shape.activation == "relu":
            inner = inner.clamp_min(0)
        else:
            inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        return self.norm(f"{name}.ffn_norm", x + self.drop(side, self.linear(f"{name}.fc2", inner)))

    def embed(self, side: str, rows: Rows) -> Tensor:
        tokens, positions = torch.tensor([t for t, _ in rows]), torch.tensor([p for _, p in rows])
        x = self.shape.scale * self.p["embedding.weight"][tokens]
        x = x + self.p[f"{side}.positions.weight"][positions]
        norm = f"{side}.embedding_norm"
        return self.drop(side, self.norm(norm, x) if f"{norm}.weight" in self.p else x)

    def encode(self, source: Sequence[int]) -> Tensor:
        x = self.embed("encoder", [(token, position) for position, token in enumerate(source)])
        for number in range(self.shape.encoder_layers):
            name = f"encoder.layers.{number}"
            out = self.drop("encoder", self.attend(f"{name}.self_attention", x, x, None))
            x = self.norm(f"{name}.self_attention_norm", x + out)
            x = self.feed_forward(name, x)
        return x

    def decode(
        self,
        source: Sequence[int],
        content: Rows,
        content_mask: Tensor,
        query: Rows = (),
        query_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the content rows and of the query rows; all keys come from the content rows."""
        states = self.encode(source)
        x = self.embed("decoder", content)
        y = self.embed("decoder", query) if query else None
        for number in range(self.shape.decoder_layers):
            name = f"decoder.layers.{number}"
            new_x = self._layer(name, x, x, content_mask, states)
            y = None if y is None else self._layer(name, y, x, query_mask, states)
            x = new_x
        table = self.p["embedding.weight"]
        return x @ table.T, None if y is None else y @ table.T

    def _layer(self, name: str, x: Tensor, content: Tensor, mask: Tensor | None, states: Tensor) -> Tensor:
        out = self.drop("decoder", self.attend(f"{name}.self_attention", x, content, mask))
        x = self.norm(f"{name}.self_attention_norm", x + out)
        out = self.drop("decoder", self.attend(f"{name}.cross_attention", x, states, None))
        return self.feed_forward(name, self.norm(f"{name}.cross_attention_norm", x + out))

    def ar(self, source: Sequence[int], content: Rows, query: Rows) -> Tensor:
        """Logits of the AR queries, or of the content rows if there are no queries."""
        n = len(content)
        mask = matrix(n, n, lambda i, j: j <= i)
        plain, from_query = self.decode(source, content, mask, query, mask)
        return plain if from_query is None else from_query

    def nar(self, source: Sequence[int], target: Sequence[int], masked: Sequence[int], mask: int) -> Tensor:
        """Logits of the masked positions, from the original part alone, in target order."""
        rows = [(mask if p in masked else token, p) for p, token in enumerate(target)]
        logits, _ = self.decode(source, rows, matrix(len(rows), len(rows), lambda i, j: True))
        return logits[list(masked)]

    def aux(self, source: Sequence[int], target: Sequence[int], masked: Sequence[int], mask: int) -> Tensor:
        """Logits of the AUX queries: original part, then the gold tokens; layout of the released code."""
        shown = [(token, p) for p, token in enumerate(target) if p not in masked]
        hidden = [(mask, p) for p in masked]
        gold = [(target[p], p) for p in masked]
        v, m = len(shown), len(masked)

        def content_sees(i: int, j: int) -> bool:
            if i < v + m:
                return j < v + m
            if j < v:
                return True
            return j - v > i - v - m if j < v + m else j - v - m <= i - v - m

        def query_sees(i: int, j: int) -> bool:
            if j < v:
                return True
            return j - v >= i if j < v + m else j - v - m < i

        total = v + 2 * m
        masks = matrix(total, total, content_sees), matrix(m, total, query_sees)
        _, logits = self.decode(source, shown + hidden + gold, masks[0], hidden, masks[1])
        assert logits is not None
        return logits

    def length(self, source: Sequence[int]) -> Tensor:
        """Logits of the length head."""
        return self.encode(source).mean(0) @ self.p["length_head.weight"].T


def matrix(rows: int, columns: int, sees: Callable[[int, int], bool]) -> Tensor:
    """A boolean mask, cell by cell."""
    return torch.tensor([[bool(sees(i, j)) for j in range(columns)] for i in range(rows)])
