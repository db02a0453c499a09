"""
Text-aware image encoding: the encoder reads the question about an image beside its patches.

    'append'  the question's tokens follow the patches through every block, without positions, and are dropped at the
              end; no identity at the start, for the patches attend to them from the first step
    'prefix'  in the last blocks each patch also attends to the question's tokens, by a softmax of their own, behind a
              gate per head that starts at 0: then the encoder is itself, bit for bit (LLaMA-Adapter, arXiv 2303.16199)

A question's tokens are the decoder's own embeddings, which get no gradient from here, so that the encoder sees a bag of
words. The question is the first one of a row, without system prompt and image, after which the first answer comes (in
dpo.py the last one, whose two answers are compared): never an answer, nor a later turn. Without a question, as in
captions, features are the encoder's own.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from errors import Field, UserError
from vit import Text

SPEC = {'kind': Field(str), 'layers': Field(int, 0, 1000, optional=True)}      # a description's 'text_cond'


class TextCond(nn.Module):
    """
    Questions to what a tower reads of them: Linear from the decoder's width n_in to the tower's, GELU, Linear,
    LayerNorm, and with 'prefix' the gates (L,H), zeros, of the last L blocks' heads.
    spec     see SPEC; layers: L, 0 = all
    encoder  SigLIP or DINOv2; UserError for any other, for a kind that is none, and for fewer blocks than L
    """
    def __init__(self, spec, encoder, n_in):
        super().__init__()
        kind, layers, n_block = spec['kind'], spec.get('layers') or 0, getattr(encoder, 'n_block', 0)
        if kind not in ('append', 'prefix'):
            raise UserError(f"text_cond={kind!r}: expected 'none', 'append' or 'prefix'")
        if not n_block:
            raise UserError(f"text_cond={kind!r} needs one tower that has blocks: give --encoder=siglip or dinov2, and "
                            "an encoder_layer beyond its patch embedding")
        if layers > n_block:
            raise UserError(f"cond_layers={layers}: the encoder runs {n_block} blocks; give fewer, or 0 = all")
        C = encoder.width
        self.mlp = nn.Sequential(nn.Linear(n_in, C), nn.GELU(), nn.Linear(C, C), nn.LayerNorm(C))
        shape = layers or n_block, encoder.config.num_attention_heads
        self.gates = nn.Parameter(torch.zeros(shape)) if kind == 'prefix' else None

    def forward(self, questions, embedding):
        """questions: N lists of ids, none empty; embedding (V,n_in), the decoder's -> vit.Text"""
        device = embedding.device
        ids = pad_sequence([torch.tensor(ids) for ids in questions], batch_first=True).to(device)        # (N,P)
        length = torch.tensor([len(ids) for ids in questions], dtype=torch.int32).to(device)
        return Text(self.mlp(F.embedding(ids, embedding.detach())), length, self.gates)


def text_cond_spec(config):
    """What a description says of a config's text_cond: nothing for 'none', else its 'text_cond'."""
    kind = config.get('text_cond', 'none')
    if kind != 'prefix' and config.get('cond_layers'):
        raise UserError(f"cond_layers is of text_cond='prefix', here it is {kind!r}")
    if kind == 'none':
        return {}
    return dict(text_cond=dict(kind=kind, layers=config['cond_layers']) if kind == 'prefix' else dict(kind=kind))


FRESH_TEXT_COND = '{} encodes images alone: fresh weights of text_cond={!r}'
