"""The student of the Fashion-MNIST demo: one hidden layer, 25,450 parameters."""

import torch
from torch import nn


class MLPStudent(nn.Module):
    """Maps images to class logits through one hidden layer of `hidden` units (784-hidden-10)."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, hidden)
        self.classify = nn.Linear(hidden, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits float32 [B, 10] (nats, temperature 1) for images float32 [B, 1, 28, 28].

        B: images. The images are those of `pipelines.fashion.inputs.decode`.
        """
        logits: torch.Tensor = self.classify(torch.relu(self.hidden(images.flatten(1))))
        return logits
