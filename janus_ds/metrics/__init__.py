"""Scores of translations and of GLGE's tasks, in percent, as the official scripts compute them.

Everything here takes text and gives numbers; nothing needs a model. Start reading at `translation` and
`glge`.
"""
