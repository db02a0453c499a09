# a projector of two transformer blocks; after config/ckpt80_img10.py
name, projector = f'{name}_attn', 'attn'
