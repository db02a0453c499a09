# a projector of four linear layers; after config/ckpt80_img10.py
name, projector = f'{name}_mlp4', 'mlp4'
