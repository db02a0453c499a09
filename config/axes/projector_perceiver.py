# a perceiver, as many tokens as the encoder gives; after config/ckpt80_img10.py
name, projector = f'{name}_perceiver', 'perceiver'
