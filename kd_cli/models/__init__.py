"""The models that ship with the tool: builders that map images [B, *input_shape] to logits [B, num_classes].

A builder draws the initial weights from torch's global generator; the caller seeds it. A user's own builder takes the
same two arguments, `input_shape` and `num_classes`, and any keys of its own.
"""
