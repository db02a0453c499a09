# gated cross-attention in place of features in the row; after config/ckpt80_img10.py
name, fusion, cross_every = f'{name}_cross', 'cross', 2
