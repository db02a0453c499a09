# a perceiver of 4 tokens an image; after config/ckpt80_img10.py
name, token_mode, image_tokens = f'{name}_query4', 'query', 4
