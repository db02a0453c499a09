"""
What stands between an image encoder and a decoder: projectors of features to the decoder's width.
"""
import torch.nn as nn
import torch.nn.functional as F


class Projector(nn.Module):
    """Image features to the decoder's width: Linear to 4 x the encoder's width, GELU, Linear down (appendix B)."""
    def __init__(self, n_in, n_out):
        super().__init__()
        self.fc1 = nn.Linear(n_in, 4 * n_in)
        self.fc2 = nn.Linear(4 * n_in, n_out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


PROJECTORS = {'mlp2': Projector}
