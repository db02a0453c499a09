# a projector of one linear layer; after config/ckpt80_img10.py
name, projector = f'{name}_linear', 'linear'
