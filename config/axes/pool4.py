# the grid of features pooled to 4 tokens an image; after config/ckpt80_img10.py
name, token_mode, image_tokens = f'{name}_pool4', 'pool', 4
