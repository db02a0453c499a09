"""
The reasoner that smart101.py trains: a frozen decoder and a frozen image encoder, a Q-Former layer, heads for answers.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from puzzles import N_STEP, PADS

N_HEAD = 8                               # of the Q-Former's attention


def mlp(n_in, n_out, dropout):
    """LayerNorm and two layers; with PyTorch's smaller weights, what a picture changes fades on the way."""
    layers = nn.LayerNorm(n_in), nn.Linear(n_in, n_in), nn.GELU(), nn.Dropout(dropout), nn.Linear(n_in, n_out)
    for layer in (layers[1], layers[4]):
        nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class QFormer(nn.Module):
    """
    One layer of BLIP-2's Q-Former (arXiv 2301.12597): learned queries attend to themselves and the question, then to
    every patch. patches (B,P,D), text (B,T,D), hidden (B,T) bool, true at pads -> (B,n_query,D)
    """
    def __init__(self, width, n_query, dropout):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(n_query, width))          # alike, they would stay one query
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.to_text, self.to_patches = (nn.MultiheadAttention(width, N_HEAD, dropout, batch_first=True)
                                         for _ in range(2))
        self.feed_forward = mlp(width, width, dropout)

    def forward(self, patches, text, hidden):
        x = self.queries.expand(len(patches), -1, -1)                            # (B,Q,D)
        n_query, keys = x.shape[1], self.norms[0](torch.cat((x, text), 1))       # (B,Q+T,D)
        hidden = F.pad(hidden, (n_query, 0))                                     # queries are always seen
        x = x + self.to_text(keys[:, :n_query], keys, keys, key_padding_mask=hidden, need_weights=False)[0]
        patches = self.norms[1](patches)
        x = x + self.to_patches(self.norms[2](x), patches, patches, need_weights=False)[0]
        return x + self.feed_forward(x)


class AnswerHead(nn.Module):
    """(b,D) -> (b,S,n_out): S is 1, or of a sequence N_STEP: of a GRU that is given the same at each step."""
    def __init__(self, width, n_out, n_step, dropout):
        super().__init__()
        self.n_step, self.gru = n_step, nn.GRU(width, width, batch_first=True) if n_step > 1 else None
        self.out = mlp(width, n_out, dropout)

    def forward(self, x):
        x = x[:, None].expand(-1, self.n_step, -1)                               # (b,S,D)
        return self.out(self.gru(x)[0] if self.gru else x)


class Reasoner(nn.Module):
    """
    vlm      VLM whose decoder reads questions and whose encoder, where `parts` shows images, pictures: frozen
    n_class  {puzzle: how many values its answers have}
    parts    'both', 'image' or 'question'; qformer False = means over patches instead
    shared   False = each puzzle has heads of its own, for its picture (as in the paper) and its answers; True = one
             for all
    answer   'class' = a score for each value; 'value' = the value itself
    .encoder is what is frozen, one file for all checkpoints; .reasoner what trains.
    """
    n_slot = 0                           # positions of a row that an image takes

    def __init__(self, vlm, n_class, *, parts, qformer, shared, answer, width, n_query, dropout, pad_id):
        super().__init__()
        self.parts, self.shared, self.pad_id = parts, shared, pad_id
        self.encoder = nn.ModuleDict({'text': vlm.decoder, 'image': vlm.encoder}).requires_grad_(False)
        sizes = {'0': max(n_class.values())} if self.shared else {str(puzzle): n for puzzle, n in n_class.items()}
        r = self.reasoner = nn.ModuleDict()
        if parts != 'image':
            r['text'] = nn.Linear(vlm.decoder.config.n_embd, width)
        if parts != 'question':
            r['patches'] = nn.Linear(vlm.encoder.width, width)
            r['image_heads'] = nn.ModuleDict({key: mlp(width, width, dropout) for key in sizes})
            if qformer:
                r['qformer'] = QFormer(width, n_query, dropout)
        r['fuse'] = mlp(width * (1 + (parts == 'both')), width, dropout)
        r['answers'] = nn.ModuleDict({
            key: AnswerHead(width, n if answer == 'class' else 1, N_STEP if int(key) in PADS else 1, dropout)
            for key, n in sizes.items()})

    decoder = property(lambda self: self.encoder['text'])

    def forward(self, tokens, images, puzzles):
        """
        tokens   (B,T) int64, pad_id after each question; images (B,3,S,S) uint8 or None; puzzles a list of B numbers
        returns  list of (rows (b,) int64, their answers' scores or values (b,S,n) float32), one for each head
        """
        r, vectors, hidden = self.reasoner, [], tokens == self.pad_id            # (B,T)
        if self.parts == 'image':        # a question of no ids
            hidden, text = hidden[:, :0], torch.zeros(len(tokens), 0, r['patches'].out_features, device=tokens.device)
        else:
            with torch.no_grad():        # causal: no id sees the pads behind it
                text = self.decoder.trunk(self.decoder.tok_embeddings(tokens))
            text = r['text'](text)                                               # (B,T,D)
            kept = ~hidden[..., None]
            vectors.append((text * kept).sum(1) / kept.sum(1).clamp(min=1))      # (B,D)
        if self.parts != 'question':
            with torch.no_grad():
                patches = self.encoder['image'](images)
            patches = r['patches'](patches)                                      # (B,P,D)
            vectors.append((r['qformer'](patches, text, hidden) if 'qformer' in r else patches).mean(1))
        keys, found = ['0' if self.shared else str(puzzle) for puzzle in puzzles], []
        for key in dict.fromkeys(keys):
            rows = torch.tensor([i for i, k in enumerate(keys) if k == key], device=tokens.device)
            mine = [vector[rows] for vector in vectors]                          # (b,D) each
            if self.parts != 'question':
                mine[-1] = r['image_heads'][key](mine[-1])
            found.append((rows, r['answers'][key](r['fuse'](torch.cat(mine, 1))).float()))
        return found


def answer_loss(found, targets, weights, answer):
    """
    The losses of Reasoner's answers: cross-entropy over values, or for answer='value' the absolute difference.
    targets  (B,T) int64, an answer's S values first; weights (B,) of each of a row's S losses
    returns  the weighted sum (), and (2,B) float32 for the log as VLM gives it: a row's sum, and zeros
    """
    total, row_loss = 0.0, targets.new_zeros(2, len(targets), dtype=torch.float32)
    for rows, scores in found:
        y = targets[rows, :scores.shape[1]]                                      # (b,S)
        if answer == 'class':
            loss = F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction='none').view_as(y)
        else:
            loss = (scores[..., 0] - y).abs()
        total = total + (loss * weights[rows, None]).sum()
        row_loss[0, rows] = loss.detach().sum(1)
    return total, row_loss
